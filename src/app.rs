//! What every call works with: the machine, our own files, the story, and the configuration once somebody needs it.

use crate::config::Config;
use crate::exit::{Exit, Result};
use crate::handoff::Handoff;
use crate::handoff::kept::history::{self, History};
use crate::handoff::kept::store::{self, Store};
use crate::story::Story;
use crate::sys::{Kernel, forget_callers_signals, heed_termination, trace};

/// As long as it is there each handoff tells where its time goes, whoever calls.
const TRACE: &str = "/run/gpu-handoff/trace";

pub struct App<'a> {
    pub kernel: &'a dyn Kernel,
    pub store: Store,
    pub story: Story,
}

impl<'a> App<'a> {
    pub fn new(kernel: &'a dyn Kernel) -> App<'a> {
        forget_callers_signals();
        let history = History::at(kernel.path(history::PATH));
        let store = Store::at(kernel.path(store::DIRECTORY)).with_history(history);
        let story = Story::new(kernel.is_real());
        App { kernel, store, story }
    }

    /// A mistake in the configuration must not keep a VM from starting: hooks say so and go on without that key.
    pub fn config_for_hook(&self) -> Config {
        let (config, problems) = Config::lenient(self.kernel);
        problems.iter().for_each(|problem| self.story.warn(problem));
        config
    }

    /// # Errors
    /// When the configuration has a mistake: a person can fix it and try again.
    pub fn config_for_verb(&self) -> Result<Config> {
        Config::strict(self.kernel).map_err(Exit::usage)
    }

    pub fn handoff<'h>(&'h self, config: &'h Config) -> Handoff<'h> {
        heed_termination();
        if self.kernel.exists(TRACE) {
            trace::begin(self.kernel.now());
        }
        Handoff { kernel: self.kernel, store: &self.store, config, story: &self.story }
    }
}
