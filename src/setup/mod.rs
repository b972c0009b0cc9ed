//! What a host needs before GPUs can change hands, and which guests take part.
//!
//! Files of our own only: somebody else's are read, and told of where they are in the way.

pub mod bootloader;
pub mod conflicts;
pub mod hookscript;
pub mod vfio;
