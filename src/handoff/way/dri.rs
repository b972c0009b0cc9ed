//! The cards' nodes in /dev/dri, before and after: where nvidia_drm looks for cards only when it is loaded, a card that
//! comes home has none, and those of the others may have other names. What nobody uses is loaded anew; the rest is told.

use super::Handoff;
use crate::address::Address;
use crate::gpu::console::Console;
use crate::gpu::dri::{self, Anew, Idle, Names};
use crate::gpu::inventory::{READ_LIMIT, Slot, nvidia_slots};
use crate::handoff::kept::record::{HomeOf, Record, Stopped};
use crate::handoff::kept::store::{Locked, Stack};
use crate::handoff::kept::to_start::ToStart;
use crate::handoff::plan::step::Step;
use crate::handoff::plan::{Phase, Plan};
use crate::handoff::way::in_the_way;
use crate::handoff::way::run::{OnFailure, Outcome};
use crate::sorted;
use crate::sys::Share;
use std::time::Duration;

impl Handoff<'_> {
    /// Before a card leaves. A single one has its nodes to itself.
    pub(super) fn keep_dri(&self, locked: &Locked) {
        let names = dri::names(self.kernel).filter(|names| !names.is_empty() && nvidia_slots(self.kernel).len() > 1);
        if let Some(Err(error)) = names.map(|names| locked.keep_dri(&names)) {
            self.story.warn(&format!("{error:#}"));
        }
    }

    /// After a card has left: what those that stay have in its place.
    pub(super) fn tell_dri(&self) {
        let before = self.store.dri();
        let now = dri::names(self.kernel).unwrap_or_default();
        for address in dri::differences(&before, &now) {
            self.story.say(&format!(
                "  note: {}, until all cards are home: nvidia_drm names them when it is loaded",
                dri::in_words(&before, &now, address)
            ));
        }
    }

    /// How the stack must be had by who comes home.
    pub(super) fn share_to_restore(&self) -> Share {
        if self.store.dri().is_empty() { Share::Together } else { Share::Alone }
    }

    /// After a card has come home, as long as its record is there: whoever is killed in between is put right. None when
    /// there was nothing to do; what failed is told, and leaves no card stranded as long as the driver has it.
    pub(super) fn restore_dri(
        &self,
        locked: &Locked,
        stack: &Stack,
        record: &Record,
        end: Duration,
    ) -> Option<Outcome> {
        let before = self.store.dri();
        if before.is_empty() {
            return None;
        }
        let mut now = dri::names(self.kernel)?;
        let has_time = end.saturating_sub(self.kernel.now()) >= self.config.time.handoff / 2;
        let may = stack.is_enough_for(Share::Alone) && has_time && self.store.wedged_slots().is_empty();
        let anew = dri::anew(&before, &now, self.idle(locked, &now)).filter(|_| may);
        let done = match anew {
            Some(Anew::Stack) => self.load_stack_anew(locked, stack, record, end),
            Some(Anew::Drm) => Some(self.load_anew(locked, stack, record, Anew::Drm, end)),
            None => None,
        };
        if done.is_some() {
            now = dri::names(self.kernel).unwrap_or_default();
        }
        let differ = dri::differences(&before, &now);
        // What came of loading all of it anew is how it is from now on.
        let is_final = anew == Some(Anew::Stack)
            && done.as_ref().is_some_and(|(outcome, was_unloaded)| *was_unloaded && outcome.is_complete());
        let is_settled = differ.is_empty() || is_final;
        if dri::are_all_here(&before, &now)
            && is_settled
            && let Err(error) = locked.forget_dri()
        {
            self.story.warn(&format!("{error:#}"));
        }
        if !differ.is_empty() {
            let text: Vec<String> = differ.iter().map(|address| dri::in_words(&before, &now, *address)).collect();
            let text = text.join("; ");
            if is_final {
                self.story.warn(&format!("{text}, and so they stay from now on"));
            } else if dri::are_all_here(&before, &now) {
                self.story.warn(&format!("{text}; {}", self.remedy_of_dri(record)));
            } else {
                self.story.say(&format!("  note: {text}, until all cards are home"));
            }
        }
        done.map(|(outcome, _)| outcome)
    }

    /// What is about to start again on another card uses it already: without a driver it would not run.
    fn idle(&self, locked: &Locked, now: &Names) -> Idle {
        let is_elsewhere = |entry: &ToStart| entry.slots.iter().any(|slot| !locked.has(*slot));
        // A VM takes the card from the driver.
        let uses_driver = |entry: &ToStart| !matches!(entry.what, Stopped::Vm(_));
        let starts = self.to_start().iter().any(|entry| uses_driver(entry) && is_elsewhere(entry));
        let idle = dri::idle(self.kernel, now);
        Idle { stack: idle.stack && !starts, ..idle }
    }

    /// What is unloaded is loaded again, whatever came in between. And whether all of it was unloaded.
    fn load_anew(&self, locked: &Locked, stack: &Stack, record: &Record, anew: Anew, end: Duration) -> (Outcome, bool) {
        let modules = dri::modules(self.kernel, anew);
        let cards: Vec<Slot> = nvidia_slots(self.kernel).into_iter().filter(|slot| slot.gpu().is_some()).collect();
        let addresses: Vec<Address> = cards.iter().filter_map(|slot| Some(slot.gpu()?.address)).collect();
        let console = Console::read(self.kernel, &addresses, READ_LIMIT);
        let unload = modules.iter().map(|module| (Phase::Complete, Step::Unload { module: module.clone() })).collect();
        let mut load: Plan = vec![(Phase::Complete, Step::Load { modules: modules.iter().rev().cloned().collect() })];
        load.push((Phase::Complete, Step::MakeNodes));
        if console.is_attached {
            load.push((Phase::Complete, Step::Console { attach: true }));
        }
        let unloaded = self.run(locked, stack, record, &unload, OnFailure::Break, end);
        let mut loaded = self.run(locked, stack, record, &load, OnFailure::GoOn, end);
        let was_unloaded = unloaded.is_complete();
        if !was_unloaded {
            self.story.warn(&unloaded.problem());
        }
        loaded.stuck.extend(unloaded.stuck);
        (loaded, was_unloaded)
    }

    /// The other cards lose their driver for a moment: as long as that lasts the record has them as well, so that whoever
    /// is killed is put right. None while somebody else is at one of them.
    fn load_stack_anew(
        &self,
        locked: &Locked,
        stack: &Stack,
        record: &Record,
        end: Duration,
    ) -> Option<(Outcome, bool)> {
        let whole = self.store.record(&record.owner).ok()??;
        let homes = |slot: &Slot| Some(HomeOf::now(self.kernel, slot.gpu()?));
        let cards =
            nvidia_slots(self.kernel).into_iter().filter(|slot| slot.gpu().is_some_and(|gpu| gpu.is_on("nvidia")));
        let others: Vec<HomeOf> = cards.filter(|slot| !locked.has(slot.id)).filter_map(|slot| homes(&slot)).collect();
        let slots = sorted::set(others.iter().map(|home| home.slot));
        let _locked = self.store.lock(&slots, Duration::ZERO).ok()??;
        // Until now others could begin. What is to start from now on waits for the lock.
        if !self.idle(locked, &dri::names(self.kernel)?).stack {
            return None;
        }
        let with = |record: &Record| {
            let functions = record.functions.iter().chain(&others).cloned().collect();
            Record { functions, ..record.clone() }
        };
        locked.save(&with(&whole)).ok()?;
        let done = self.load_anew(locked, stack, &with(record), Anew::Stack, end);
        if done.0.is_complete() {
            self.save(locked, &whole);
        }
        Some(done)
    }

    fn remedy_of_dri(&self, record: &Record) -> String {
        let modules = dri::modules(self.kernel, Anew::Stack);
        let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        let holder = in_the_way::of_unloading(self.kernel, &modules, self.config.time.handoff / 10);
        let slot = record.slot();
        let again = format!("gpu-handoff to-vfio {slot} && gpu-handoff to-nvidia {slot}");
        match holder {
            Some(holder) => format!("{holder}; end it ({}), then: {again}", holder.remedy()),
            None => format!("when nobody uses any card: {again}"),
        }
    }
}
