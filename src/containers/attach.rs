//! Lets a container use the GPU, and keeps what it wrote for that up to date.

use super::attaching::{Attaching, Edit};
use super::record;
use super::{Wish, config};
use crate::App;
use crate::exit::Result;

/// # Errors
/// Why the container is left as it is.
pub fn attach(app: &App, ctid: u32, wish: &Wish) -> Result<()> {
    Attaching::read(app, ctid, wish)?.carry_out(app)
}

/// What [`attach`] would do now, a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, ctid: u32, wish: &Wish) -> Result<String> {
    let attaching = Attaching::read(app, ctid, wish)?;
    attaching.warn(app);
    let lines = attaching.lines();
    Ok(attaching.title() + if lines.is_empty() { "  nothing to do\n" } else { &lines })
}

/// The containers that were attached on this host, by CTID.
pub fn attached(app: &App) -> Vec<u32> {
    let mut ids = record::all(app.kernel);
    ids.retain(|ctid| app.kernel.exists(&config::path(*ctid)));
    ids
}

/// Brings what [`attach`] wrote up to the numbers of now: majors, minors. Whether anything had to be changed; nothing to
/// do for a container that was not attached. While a GPU of its is away its numbers are not known: then only what has
/// become another GPU's is taken out.
///
/// # Errors
/// Why the container is left as it is.
pub fn refresh(app: &App, ctid: u32) -> Result<bool> {
    // Mostly there is nothing to do, and then nobody is kept waiting for the lock.
    if Edit::refresh(app, ctid)?.is_none() {
        return Ok(false);
    }
    let lock = config::lock(app, ctid, "gpu-handoff container sync --all")?;
    let Some((edit, wanted)) = Edit::refresh(app, ctid)? else { return Ok(false) };
    let summary = edit.summary().unwrap_or_default();
    edit.carry_out(app, ctid, &wanted, &lock)?;
    app.story.say(&format!("container {ctid}: {summary} in {}", config::path(ctid)));
    Ok(true)
}

/// As [`refresh`], of every container that was attached; what does not work is told. Those with other device rules now.
pub fn refresh_all(app: &App) -> Vec<u32> {
    let is_changed = |ctid: &u32| {
        let changed = refresh(app, *ctid);
        changed.inspect_err(|exit| app.story.warn(&exit.to_string())).is_ok_and(|changed| changed)
    };
    attached(app).into_iter().filter(is_changed).collect()
}
