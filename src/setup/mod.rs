//! What a host needs before GPUs can change hands, and which guests take part.

pub mod hookscript;
