//! Asks who uses the GPU to let go of it without being stopped: a program of the administrator's, on the host or in a
//! container, such as one that unloads a model. Nothing is on record for that: whoever let go has what it needs again when
//! it next asks for the GPU.

use super::{Handoff, halt};
use crate::gpu::holders::Devices;
use crate::handoff::kept::record::Stopped;
use crate::handoff::plan::policy::{self, Release};
use std::time::Duration;

/// The phase's name in the log.
pub(super) const PHASE: &str = "ask";

/// Of `time.stop_s`, what one may take; all together may take all of it.
const PART: u32 = 3;

/// A program may have said yes before what it asked has closed the GPU.
const GRACE: Duration = Duration::from_secs(10);

/// A look at every process costs more than a glance at one.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

impl Handoff<'_> {
    /// Each in turn. Whether it helped, the next look shows.
    pub(super) fn ask_to_let_go(&self, releases: &[Release], devices: &Devices) {
        let stop = self.config.time.stop;
        let end = self.kernel.now() + stop;
        for release in releases {
            let begin = self.kernel.now();
            let problem = self.ask(release, devices, (stop / PART).min(end.saturating_sub(begin))).err();
            let took = self.kernel.now().saturating_sub(begin);
            let failed = if problem.is_some() { ", FAILED" } else { "" };
            self.story.phase(PHASE, took, &format!("{}{failed}", release.who));
            if let Some(problem) = problem {
                let program = release.program.first().map_or("", String::as_str);
                self.story.warn(&format!("{} does not let go: {program}: {problem}", release.who));
            }
        }
    }

    fn ask(&self, release: &Release, devices: &Devices, limit: Duration) -> Result<(), String> {
        let id;
        let mut words: Vec<&str> = release.program.iter().map(String::as_str).collect();
        if let Stopped::Container(ctid) = &release.who {
            id = ctid.to_string();
            words.splice(0..0, [halt::PCT, "exec", &id, "--"]);
        }
        let Some((program, arguments)) = words.split_first() else { return Ok(()) };
        let end = self.kernel.now() + limit;
        self.kernel.program(program, arguments, limit).map_err(|error| error.to_string())?;
        let end = end.min(self.kernel.now() + GRACE);
        loop {
            let found = devices.find(self.kernel, end.saturating_sub(self.kernel.now()))?;
            if !found.holders.iter().any(|holder| policy::in_which(holder).as_ref() == Some(&release.who)) {
                return Ok(());
            }
            if self.kernel.is_asked_to_end() || self.kernel.now() >= end {
                return Err("it still has the GPU open".to_string());
            }
            self.kernel.sleep(BETWEEN_LOOKS);
        }
    }
}
