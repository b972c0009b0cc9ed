//! Why a run ends before its work is done: one line for a person and an exit code that scripts rely on.

use crate::trouble::Trouble;
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
    pub trouble: Trouble,
}

pub type Result<T> = std::result::Result<T, Exit>;

impl Exit {
    pub fn new(code: Code, trouble: impl Into<Trouble>) -> Exit {
        Exit { code, trouble: trouble.into() }
    }

    pub fn failed(trouble: impl Into<Trouble>) -> Exit {
        Exit::new(Code::Failed, trouble)
    }

    pub fn usage(trouble: impl Into<Trouble>) -> Exit {
        Exit::new(Code::Usage, trouble)
    }

    pub fn refused(trouble: impl Into<Trouble>) -> Exit {
        Exit::new(Code::Refused, trouble)
    }

    pub fn overrun(trouble: impl Into<Trouble>) -> Exit {
        Exit::new(Code::Overrun, trouble)
    }

    pub fn locked(trouble: impl Into<Trouble>) -> Exit {
        Exit::new(Code::Locked, trouble)
    }

    /// As [`Trouble::of`].
    #[must_use]
    pub fn of(self, whom: &str) -> Exit {
        Exit::new(self.code, self.trouble.of(whom))
    }

    /// As [`Trouble::and`].
    #[must_use]
    pub fn and(self, more: &str) -> Exit {
        Exit::new(self.code, self.trouble.and(more))
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.trouble.fmt(f)
    }
}

impl std::error::Error for Exit {}

/// Reading and writing our own files: the context says which file, the cause says why.
impl From<anyhow::Error> for Exit {
    fn from(error: anyhow::Error) -> Exit {
        Exit::failed(format!("{error:#}"))
    }
}
