//! Why a run ends before its work is done: one line for a person and an exit code that scripts rely on.

use std::fmt;

/// The exit codes of the command line contract; 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Towards a VM: rolled back. Towards home: as far as possible, the record is kept.
    Failed = 1,
    /// Bad usage, unknown guest, a configuration this program cannot act on.
    Usage = 2,
    /// Nothing was touched.
    Refused = 3,
    /// The time box was overrun, or the slot is wedged.
    Overrun = 4,
    /// The lock was not obtained in time.
    Locked = 5,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: Code,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Exit>;

impl Exit {
    pub fn failed(message: impl Into<String>) -> Exit {
        Exit { code: Code::Failed, message: message.into() }
    }

    pub fn usage(message: impl Into<String>) -> Exit {
        Exit { code: Code::Usage, message: message.into() }
    }

    pub fn refused(message: impl Into<String>) -> Exit {
        Exit { code: Code::Refused, message: message.into() }
    }

    pub fn overrun(message: impl Into<String>) -> Exit {
        Exit { code: Code::Overrun, message: message.into() }
    }

    pub fn locked(message: impl Into<String>) -> Exit {
        Exit { code: Code::Locked, message: message.into() }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

/// Reading and writing our own files: the context says which file, the cause says why.
impl From<anyhow::Error> for Exit {
    fn from(error: anyhow::Error) -> Exit {
        Exit::failed(format!("{error:#}"))
    }
}
