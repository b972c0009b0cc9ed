//! Takes out of a container's configuration what attach put in, and nothing else.

use super::config;
use super::edit::{self, Change};
use super::line::Line;
use super::record::{self, Attachment};
use super::theirs::{self, Theirs};
use super::wanted::readable_record;
use crate::App;
use crate::address::{SlotId, list};
use crate::exit::Result;
use crate::gpu::containers;
use crate::proxmox::ct;
use crate::story::row;
use crate::sys::Lock;

/// What there is to do: a dry run prints it, a run carries it out.
enum Detaching {
    /// For this reason there is nothing.
    Nothing(String),
    /// Its record is of nobody, for this reason.
    Forget(String),
    Edit(Edit),
}

struct Edit {
    ctid: u32,
    slots: Vec<SlotId>,
    bytes: Vec<u8>,
    change: Change,
    /// A newline at the end is ours.
    newline: bool,
    /// What somebody made something else of.
    changed: Vec<Line>,
}

/// # Errors
/// Why the container is left as it is.
pub fn detach(app: &App, ctid: u32) -> Result<()> {
    match Detaching::read(app, ctid)? {
        Detaching::Nothing(why) => app.story.say(&why),
        Detaching::Forget(why) => {
            record::remove(app.kernel, ctid)?;
            app.story.say(&why);
        }
        Detaching::Edit(_) => {
            let lock = config::lock(app, ctid, &format!("gpu-handoff container detach {ctid}"))?;
            // Read anew: another call may have been quicker, and Proxmox may have changed the file.
            match Detaching::read(app, ctid)? {
                Detaching::Nothing(why) | Detaching::Forget(why) => app.story.say(&why),
                Detaching::Edit(edit) => edit.carry_out(app, lock)?,
            }
        }
    }
    Ok(())
}

/// What [`detach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, ctid: u32) -> Result<String> {
    Ok(match Detaching::read(app, ctid)? {
        Detaching::Nothing(why) | Detaching::Forget(why) => format!("{why}\n"),
        Detaching::Edit(edit) => edit.to_text(),
    })
}

impl Detaching {
    fn read(app: &App, ctid: u32) -> Result<Detaching> {
        let Some(record) = readable_record(app, ctid)? else {
            return Ok(Detaching::Nothing(not_ours(app, ctid, &config::read(app.kernel, ctid)?)));
        };
        if config::is_gone(app.kernel, ctid) {
            let why = format!("container {ctid} does not exist any more: its record is forgotten");
            return Ok(Detaching::Forget(why));
        }
        let bytes = config::read(app.kernel, ctid)?;
        config::refuse_read_only(app.kernel, ctid)?;
        if record.lines.is_empty() {
            return Ok(Detaching::Forget(not_ours(app, ctid, &bytes)));
        }
        config::refuse_locked(ctid, &ct::parse(&bytes))?;
        let Attachment { slots, lines, newline, .. } = record;
        let change = Change::detach(&bytes, &lines);
        let changed = edit::changed(&bytes, &lines).into_iter().cloned().collect();
        Ok(Detaching::Edit(Edit { ctid, slots, bytes, change, newline, changed }))
    }
}

impl Edit {
    fn to_text(&self) -> String {
        let mut text = format!("container {} is detached from {}\n", self.ctid, list(&self.slots));
        text.push_str(&self.change.to_text());
        for line in &self.changed {
            text.push_str(&format!("  {}\n", row("leave", &format_args!("what somebody made of: {line}"))));
        }
        if self.change.is_nothing() {
            text.push_str("  nothing to do\n");
        }
        text
    }

    fn carry_out(self, app: &App, lock: Lock) -> Result<()> {
        let Edit { ctid, change, .. } = &self;
        let ctid = *ctid;
        if !change.is_nothing() {
            let (new, _) = change.apply(&self.bytes, self.newline && self.changed.is_empty());
            config::write(app.kernel, ctid, &new, &lock)?;
        }
        record::remove(app.kernel, ctid)?;
        drop(lock);
        for line in &self.changed {
            app.story.warn(&format!(
                "container {ctid}: somebody changed the line for {}, left as it is: it was {line}",
                line.what
            ));
        }
        if change.is_nothing() {
            app.story.say(&format!("container {ctid}: nothing that was attached is there any more: nothing to do"));
            return Ok(());
        }
        app.story.say(&format!("container {ctid}: {} in {}", change.summary(), config::path(ctid)));
        if containers::runs(app.kernel, ctid) {
            app.story.say(&format!("container {ctid} runs and keeps it until it starts again: pct reboot {ctid}"));
        }
        Ok(())
    }
}

fn not_ours(app: &App, ctid: u32, bytes: &[u8]) -> String {
    let also = match theirs::told(&Theirs::read(app.kernel, bytes)).as_slice() {
        [] => String::new(),
        others => {
            let then = theirs::how_to_take_out(ctid, others);
            format!("; these lines are somebody else's: {}; to take them out: {then}", others.join(" | "))
        }
    };
    format!("container {ctid}: nothing was attached by this host: nothing to do{also}")
}
