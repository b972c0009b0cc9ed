//! What a host needs before GPUs can change hands, and which guests take part.
//!
//! Files of our own only: somebody else's are read, and told of where they are in the way.

pub mod bootloader;
pub mod conflicts;
pub mod driver;
pub mod hookscript;
pub mod kept;
mod ours;
mod snippet;
pub mod vfio;
pub mod work_off;

use self::kept::pending;
use crate::App;
use crate::driver as installer;
use crate::exit::Result;
use crate::story::titled;

/// What to set up on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Vfio(vfio::Wish),
    Driver(driver::Wish),
    /// The driver's modules for this kernel.
    Kernel(String),
    All(vfio::Wish, driver::Wish),
    Pending,
}

/// # Errors
/// What could not be done; the next call goes on from there.
pub fn run(app: &App, what: &What) -> Result<()> {
    match what {
        What::Vfio(wish) => pending::noted(app, pending::Task::Vfio, wish.defer, vfio::setup(app, *wish)),
        What::Driver(wish) => driver::setup_and_note(app, wish),
        What::Kernel(release) => driver::kernels::build_and_note(app, release),
        What::All(vfio, driver) if driver.undo => {
            driver::setup_and_note(app, driver)?;
            vfio::setup(app, *vfio)
        }
        What::All(vfio, driver) => {
            pending::noted(app, pending::Task::Vfio, false, vfio::setup(app, *vfio))?;
            if has_driver(app)? { driver::setup_and_note(app, driver) } else { Ok(()) }
        }
        What::Pending => work_off::run(app),
    }
}

/// What [`run`] would do now: a title, and a line each.
///
/// # Errors
/// Why it would refuse.
pub fn plan(app: &App, what: &What) -> Result<String> {
    let of_driver = |wish| Ok(titled("setup driver", &driver::plan(app, wish)?));
    match what {
        What::Vfio(wish) => vfio::plan(app, *wish),
        What::Driver(wish) => of_driver(wish),
        What::Kernel(release) => Ok(titled("setup driver", &driver::kernels::plan(app, release)?)),
        What::All(vfio, driver) => {
            let mut text = vfio::plan(app, *vfio)?;
            if driver.undo || has_driver(app)? {
                text.push_str(&of_driver(driver)?);
            }
            Ok(text)
        }
        What::Pending => Ok(titled("setup pending", &pending::plan(app)?)),
    }
}

fn has_driver(app: &App) -> Result<bool> {
    Ok(installer::found(app, &app.config_for_verb()?.driver)?.is_some())
}
