//! The flags, and what a word on the command line may be. Which verb takes which stands in the table of verbs.

/// `--NAME`, or `--NAME VALUE`.
pub struct Flag {
    pub name: &'static str,
    pub value: Option<Value>,
    pub about: &'static str,
}

/// What stands for itself in a usage line, and is somebody else's to name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Of a VM.
    Vmid,
    /// Of a container.
    Ctid,
    /// Of either.
    Id,
    Slot,
    Number,
    Kernel,
    Finding,
    File,
    Storage,
    Verb,
    OneOf(&'static [&'static str]),
    /// A word of somebody else's, by what it is called.
    Word(&'static str),
}

/// What stands between blanks or `|` in a usage line.
pub enum Term {
    Value(Value),
    Flag(Flag),
}

/// One argument of a verb; of several terms any one will do.
pub enum Argument {
    Needs(&'static [Term]),
    May(&'static [Term]),
    /// As many as there are.
    Several(&'static [Term]),
}

pub const VMID: Term = Term::Value(Value::Vmid);
pub const CTID: Term = Term::Value(Value::Ctid);
pub const ID: Term = Term::Value(Value::Id);
pub const SLOT: Term = Term::Value(Value::Slot);
pub const VERB: Term = Term::Value(Value::Verb);
pub const PHASE: Term = Term::Value(Value::Word("PHASE"));
pub const MODE: Term = Term::Value(Value::Word("MODE"));

/// Goes with every verb.
pub const QUIET: Flag = Flag { name: "quiet", value: None, about: "only warnings and errors" };

/// Goes with every verb that has `--json`: as Proxmox's own tools say it.
pub const OUTPUT_FORMAT: Flag = Flag {
    name: "output-format",
    value: Some(Value::OneOf(&["text", "json"])),
    about: "the words of Proxmox's own tools: json is --json",
};

pub const JSON: Term = flag("json", "print JSON, for programs");
pub const CHECK: Term = flag("check", "end with 1 when something is not as it should be");
pub const CLUSTER: Term = flag("cluster", "every node of the cluster, as it has told it last");
pub const WATCH: Term = flag("watch", "show it again whenever it changes");
pub const NUMBER: Term = option("n", Value::Number, "only the newest, so many of them");
pub const DRY_RUN: Term = flag("dry-run", "print what would be done, and change nothing");
pub const UNFINISHED: Term = flag("unfinished", "only what a killed handoff left behind");
pub const OWED: Term = flag("owed", "what the keeper does by itself");
pub const REBOOT: Term = flag("reboot", "the VM reboots: give its next start time to begin");
pub const STOP: Term = flag("stop", "the VM has stopped: bring its GPU home");
pub const GPU: Term = option("gpu", Value::Slot, "which GPU");
pub const STYLE: Term = option("style", Value::OneOf(&["mount", "dev"]), "how the nodes get into the container");
pub const DRI: Term = flag("dri", "the DRM nodes as well");
pub const DRIVER_ONLY: Term = flag("driver-only", "no CUDA toolkit");
pub const ALL: Term = flag("all", "every container that was given a GPU");
pub const CMDLINE: Term = flag("cmdline", "turn the IOMMU on in the kernel's command line");
pub const INSTALL_DEPS: Term = flag("install-deps", "have apt install what that takes");
pub const PURGE: Term = flag("purge", "have apt purge a driver from packages");
pub const KERNEL: Term = option("kernel", Value::Kernel, "build only the driver's modules, for this kernel");
pub const DEFER: Term = flag("defer", "keep what fails for setup pending");
pub const UNDO: Term = flag("undo", "take all of it back");
pub const EXPLAIN: Term = option("explain", Value::Finding, "tell more of a finding; all lists them");
pub const FIX: Term = flag("fix", "make missing nodes, take away what is left over");
pub const REPORT: Term = flag("report", "all that a helper would ask for");
pub const STORAGE: Term = option("storage", Value::Storage, "have the hookscript on this shared storage");
pub const WRITE: Term = flag("write", "to the file that metrics.textfile names, and print nothing");
pub const TEST: Term = flag("test", "send one that says so, whatever is configured");
pub const TO: Term = option("to", Value::File, "a new file for the report");

const fn flag(name: &'static str, about: &'static str) -> Term {
    Term::Flag(Flag { name, value: None, about })
}

const fn option(name: &'static str, value: Value, about: &'static str) -> Term {
    Term::Flag(Flag { name, value: Some(value), about })
}

impl Flag {
    /// As it is typed.
    pub fn spelled(&self) -> String {
        let dashes = if self.name.len() == 1 { "-" } else { "--" };
        format!("{dashes}{}", self.name)
    }

    /// With its value, as a usage line has it.
    pub fn usage(&self) -> String {
        match self.value {
            Some(value) => format!("{} {}", self.spelled(), value.name()),
            None => self.spelled(),
        }
    }
}

impl Value {
    /// As a usage line has it.
    pub fn name(self) -> String {
        match self {
            Value::Vmid => "VMID".to_string(),
            Value::Ctid => "CTID".to_string(),
            Value::Id => "ID".to_string(),
            Value::Slot => "SLOT".to_string(),
            Value::Number => "NUMBER".to_string(),
            Value::Kernel => "KERNEL".to_string(),
            Value::Finding => "FINDING".to_string(),
            Value::File => "FILE".to_string(),
            Value::Storage => "STORAGE".to_string(),
            Value::Verb => "VERB".to_string(),
            Value::OneOf(values) => values.join("|"),
            Value::Word(name) => name.to_string(),
        }
    }
}

impl Term {
    pub fn flag(&self) -> Option<&Flag> {
        if let Term::Flag(flag) = self { Some(flag) } else { None }
    }

    fn usage(&self) -> String {
        match self {
            Term::Value(value) => value.name(),
            Term::Flag(flag) => flag.usage(),
        }
    }
}

impl Argument {
    pub fn terms(&self) -> &'static [Term] {
        match self {
            Argument::Needs(terms) | Argument::May(terms) | Argument::Several(terms) => terms,
        }
    }

    /// `[SLOT|--gpu SLOT]`
    pub fn usage(&self) -> String {
        let terms: Vec<String> = self.terms().iter().map(Term::usage).collect();
        let terms = terms.join("|");
        match self {
            Argument::Needs(_) => terms,
            Argument::May(_) => format!("[{terms}]"),
            Argument::Several(_) => format!("[{terms} ...]"),
        }
    }
}
