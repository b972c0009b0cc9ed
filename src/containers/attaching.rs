//! What there is to do so that a container gets a GPU: one list, which a dry run prints and a run carries out.

use super::edit::{self, Change, TooManyDevices};
use super::host::{UVM, facts, load_uvm, make_nodes};
use super::line;
use super::record::{self, Attachment};
use super::rules::{self, Away, Facts, Need};
use super::theirs::Theirs;
use super::wanted::{Wanted, look, not_given, readable_record, refuse_unreadable, too_many, warn_of_permissions};
use super::{Style, Wish, config, untouched};
use crate::App;
use crate::address::list;
use crate::exit::Result;
use crate::gpu::{containers, nodes};
use crate::handoff::way::reconcile::nodes_to_text;
use crate::proxmox::ct;
use crate::story::row;
use crate::sys::{Lock, Node};

/// The list, with what it was made of.
pub(super) struct Attaching {
    ctid: u32,
    wanted: Wanted,
    facts: Facts,
    tasks: Vec<Task>,
}

enum Task {
    /// Its module, whose major the rules name.
    LoadUvm,
    /// And whatever nodes loading that leaves to be made.
    Make(Vec<Node>),
    Edit(Edit),
}

impl Task {
    /// None where there is nothing to do.
    fn to_text(&self, facts: &Facts, style: Style) -> Option<String> {
        match self {
            Task::LoadUvm => Some(format!("  {}\n", row("load", &UVM))),
            Task::Make(missing) if missing.is_empty() => None,
            Task::Make(missing) => Some(format!("  {}\n", row("make", &nodes_to_text(missing)))),
            Task::Edit(edit) => {
                let mut text = edit.change.to_text();
                if facts.uvm.is_none() && style == Style::Mount {
                    text.push_str(&format!(
                        "  {}\n",
                        row("add", &format_args!("a rule for the major that {UVM} will have"))
                    ));
                }
                (!text.is_empty()).then_some(text)
            }
        }
    }
}

impl Attaching {
    /// # Errors
    /// Why the container is left as it is.
    pub fn read(app: &App, ctid: u32, wish: &Wish) -> Result<Attaching> {
        let wanted = Wanted::read(app, ctid, wish)?;
        let facts = facts(app, ctid, &wanted.slots)?;
        let edit = Edit::attach(app, ctid, &wanted, &facts)?;
        let mut tasks = vec![Task::Make(nodes::missing(app.kernel)), Task::Edit(edit)];
        if facts.uvm.is_none() {
            tasks.insert(0, Task::LoadUvm);
        }
        Ok(Attaching { ctid, wanted, facts, tasks })
    }

    /// A node of the driver's may get into the container with it.
    pub fn adds_node(&self) -> bool {
        self.tasks.iter().any(|task| match task {
            Task::LoadUvm => true,
            Task::Make(missing) => !missing.is_empty(),
            Task::Edit(edit) => edit.change.adds_node(),
        })
    }

    /// A line each; none where there is nothing to do.
    pub fn lines(&self) -> String {
        self.tasks.iter().filter_map(|task| task.to_text(&self.facts, self.wanted.style)).collect()
    }

    pub fn title(&self) -> String {
        format!("container {} gets {}\n", self.ctid, list(&self.wanted.slots))
    }

    pub fn warn(&self, app: &App) {
        self.wanted.warn(app, self.ctid, &self.facts);
    }

    /// # Errors
    /// What could not be done; what was is done is found done by the next call.
    pub fn carry_out(mut self, app: &App) -> Result<()> {
        for task in std::mem::take(&mut self.tasks) {
            match task {
                Task::LoadUvm => {
                    load_uvm(app)?;
                    self.facts = facts(app, self.ctid, &self.wanted.slots)?;
                }
                Task::Make(_) => make_nodes(app),
                Task::Edit(_) => self.edit(app)?,
            }
        }
        Ok(())
    }

    fn edit(&self, app: &App) -> Result<()> {
        let Attaching { ctid, wanted, facts, .. } = self;
        let ctid = *ctid;
        let lock = config::lock(app, ctid, &format!("gpu-handoff container attach {ctid}"))?;
        // Made anew: Proxmox may have changed the file meanwhile, and what was loaded has numbers now.
        let edit = Edit::attach(app, ctid, wanted, facts)?;
        let summary = edit.summary();
        edit.carry_out(app, ctid, wanted, &lock)?;
        drop(lock);
        self.warn(app);
        warn_of_permissions(app, ctid, facts, wanted);
        let slots = list(&wanted.slots);
        let Some(summary) = summary else {
            app.story.say(&format!("container {ctid} has {slots} already: nothing to do"));
            return Ok(());
        };
        app.story.say(&format!("container {ctid} gets {slots}: {summary} in {}", config::path(ctid)));
        if containers::runs(app.kernel, ctid) {
            app.story.say(&format!("container {ctid} runs and gets it when it starts again: pct reboot {ctid}"));
        }
        Ok(())
    }
}

/// A configuration and what becomes of it.
pub(super) struct Edit {
    old: Option<Attachment>,
    change: Change,
    new: Vec<u8>,
    newline: bool,
}

impl Edit {
    fn attach(app: &App, ctid: u32, wanted: &Wanted, facts: &Facts) -> Result<Edit> {
        let bytes = look(app, ctid)?;
        refuse_unreadable(ctid, &bytes, wanted.style)?;
        let old = readable_record(app, ctid)?;
        let recorded = old.as_ref().map_or(&[][..], |record| &record.lines);
        let needs = not_given(app, ctid, &edit::without_ours(&bytes, recorded), facts, wanted)?;
        let change = Change::attach(&bytes, recorded, &needs).map_err(|TooManyDevices| too_many(ctid))?;
        Edit::new(ctid, &bytes, old, change)
    }

    /// None when there is nothing to do.
    pub fn refresh(app: &App, ctid: u32) -> Result<Option<(Edit, Wanted)>> {
        let Some(record) = readable_record(app, ctid)? else { return Ok(None) };
        if !app.kernel.exists(&config::path(ctid)) {
            return Ok(None);
        }
        let bytes = config::read(app.kernel, ctid)?;
        let change = match Facts::read(app.kernel, &record.slots) {
            Ok(facts) if facts.uvm.is_none() => return Ok(None),
            Ok(facts) => {
                let theirs = Theirs::read(app.kernel, &edit::without_ours(&bytes, &record.lines));
                let split = |need: Need| need.by_node(&facts);
                let left = |need| theirs.left(app.kernel, vec![need], &split).unwrap_or_default();
                let needs =
                    rules::needs(&facts, record.style, record.dri).into_iter().flat_map(left).collect::<Vec<_>>();
                // Of a run that was killed in between, what is not there was not taken out: it never got there.
                let mut recorded = record.lines.clone();
                if record.unfinished {
                    let present = line::present(&bytes, &record.lines);
                    recorded.retain(|line| present.contains(&line));
                }
                Change::refresh(&bytes, &recorded, &needs).map_err(|TooManyDevices| too_many(ctid))?
            }
            Err(Away { .. }) => {
                let others = rules::needs_of_others(app.kernel, &record.slots, record.style);
                Change::withdraw(&bytes, &record.lines, &others)
            }
        };
        if change.is_nothing() {
            return Ok(None);
        }
        config::refuse_locked(ctid, &ct::parse(&bytes))?;
        config::refuse_read_only(app.kernel, ctid)?;
        let wanted = Wanted { style: record.style, slots: record.slots.clone(), dri: record.dri, warning: None };
        Ok(Some((Edit::new(ctid, &bytes, Some(record), change)?, wanted)))
    }

    fn new(ctid: u32, bytes: &[u8], old: Option<Attachment>, change: Change) -> Result<Edit> {
        // That of a container which is no more says nothing about the newline of this one.
        let is_of_this = |old: &Attachment| !Change::detach(bytes, &old.lines).is_nothing();
        let (new, newline) = change.apply(bytes, old.as_ref().is_some_and(|old| old.newline && is_of_this(old)));
        config::refuse_large(ctid, &new)?;
        Ok(Edit { old, change, new, newline })
    }

    /// None when nothing changes.
    pub fn summary(&self) -> Option<String> {
        (!self.change.is_nothing()).then(|| self.change.summary())
    }

    /// First the record, of all that is ours before and after: whatever happens then, detach finds it.
    pub fn carry_out(self, app: &App, ctid: u32, wanted: &Wanted, lock: &Lock) -> Result<()> {
        let Wanted { style, slots, dri, .. } = wanted.clone();
        let lines = self.change.ours.clone();
        let record = Attachment { style, slots, dri, lines, newline: self.newline, unfinished: false };
        if self.change.is_nothing() {
            return save(app, ctid, self.old.as_ref(), &record);
        }
        let mut both = Attachment { unfinished: true, ..record.clone() };
        let before = self.old.iter().flat_map(|old| &old.lines);
        both.lines.extend(before.filter(|line| !record.lines.contains(line)).cloned());
        save(app, ctid, self.old.as_ref(), &both)?;
        if let Err(exit) = config::write(app.kernel, ctid, &self.new, lock) {
            put_back(app, ctid, self.old.as_ref());
            return Err(exit);
        }
        put_back(app, ctid, Some(&record));
        Ok(())
    }
}

fn save(app: &App, ctid: u32, old: Option<&Attachment>, new: &Attachment) -> Result<()> {
    if old == Some(new) {
        return Ok(());
    }
    record::write(app.kernel, ctid, new).map_err(|error| untouched(ctid, format!("{error:#}")))
}

/// The record as it fits the configuration again. Should that fail it names lines that are not there, which does no
/// harm.
fn put_back(app: &App, ctid: u32, record: Option<&Attachment>) {
    let done = match record {
        Some(record) => record::write(app.kernel, ctid, record),
        None => record::remove(app.kernel, ctid),
    };
    if let Err(error) = done {
        app.story.warn(&format!("{error:#}"));
    }
}
