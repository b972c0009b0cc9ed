//! The driver's installer, a `.run` file: on this host, in the cache, or to be downloaded.

use crate::App;
use crate::config::Driver;
use crate::exit::{Exit, Result};
use crate::gpu::nvidia::Version;
use crate::teller::Teller;
use crate::trouble::Trouble;
use std::fs::{self, File};
use std::io::{self, Read};
use std::time::Duration;

/// Installers are kept here, by their own names.
pub const CACHE: &str = "/var/cache/gpu-handoff";

const CURL: &str = "/usr/bin/curl";
const SHA256SUM: &str = "/usr/bin/sha256sum";

/// The names of installers that were downloaded, a line each: when this program goes for good, so do they.
const DOWNLOADED: &str = "/var/lib/gpu-handoff/downloaded";

/// What the shell part of an installer certainly fits into.
const HEADER: u64 = 64 * 1024;

/// Of some hundred megabytes, on a disk that is busy with something else.
const SUMMING: Duration = Duration::from_secs(600);

/// Curl itself gives up much sooner when nothing comes any more.
const DOWNLOAD: Duration = Duration::from_secs(2 * 3600);

/// What curl says when a server cannot send the rest of a file, or has none.
const NO_REST: [&str; 3] = ["curl: (33)", "curl: (36)", "error: 416"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(String),
    Url(String),
}

/// An installer that is there, of the right version and with the right sum.
#[derive(Debug)]
pub struct Installer {
    /// As the kernel knows it, below whatever root there is.
    pub path: String,
    pub name: String,
    pub version: String,
    pub sha256: String,
}

/// The installer that the host's driver is to come from, and its version: the one that the configuration names, or else
/// the newest in [`CACHE`]. None when there is neither.
///
/// # Errors
/// What is wrong with it.
pub fn found(app: &App, config: &Driver) -> Result<Option<(Source, String)>> {
    if let Some(named) = [&config.runfile, &config.runfile_url].into_iter().flatten().find(|named| is_vgpu(named)) {
        return Err(vgpu(named));
    }
    let version = match (&config.runfile, &config.runfile_url) {
        (Some(path), _) => match version_in_name(path) {
            Some(version) => version,
            None => version_in_header(&header(app, path).unwrap_or_default())
                .ok_or_else(|| Exit::refused(format!("driver.runfile: {path} is no installer of NVIDIA's driver")))?,
        },
        (None, Some(url)) => version_in_name(url).ok_or_else(|| {
            Exit::usage(format!("driver.runfile_url: {url} does not end in NVIDIA-Linux-x86_64-VERSION.run"))
        })?,
        (None, None) => {
            let names = app.kernel.list(CACHE);
            let kept =
                names.iter().filter_map(|name| version_in_name(name).filter(|version| file_name(version) == *name));
            match kept.max_by_key(|version| version.parse::<Version>().ok()) {
                Some(version) => version,
                None => match names.iter().find(|name| is_vgpu(name)) {
                    Some(name) => return Err(vgpu(&format!("{CACHE}/{name}"))),
                    None => return Ok(None),
                },
            }
        }
    };
    Ok(Some((source(app, config, &version)?, version)))
}

/// Where the installer of this version comes from.
///
/// # Errors
/// When there is none, or when it is of another version by its name.
pub fn source(app: &App, config: &Driver, version: &str) -> Result<Source> {
    let kernel = app.kernel;
    if let Some(sum) = &config.sha256
        && !is_sum(sum)
    {
        return Err(Exit::usage(format!("driver.sha256: {} is no SHA-256 sum", sum.escape_debug())));
    }
    let kept = format!("{CACHE}/{}", file_name(version));
    let source = match (&config.runfile, &config.runfile_url) {
        (Some(path), _) if !kernel.exists(path) => {
            return Err(untouched(format!("driver.runfile: there is no {path}")));
        }
        (Some(path), _) => Source::File(path.clone()),
        (None, _) if kernel.exists(&kept) => Source::File(kept),
        (None, Some(_)) if config.sha256.is_none() => {
            return Err(Exit::usage("driver.runfile_url needs driver.sha256 beside it"));
        }
        (None, Some(url)) => Source::Url(url.clone()),
        (None, None) => {
            return Err(untouched(format!(
                "no installer of driver {version}, which the host has: copy {} to {CACHE}, or name it in driver.runfile or \
                 driver.runfile_url",
                file_name(version)
            )));
        }
    };
    match &source {
        Source::File(path) => {
            let header = header(app, path).map_err(|error| untouched(format!("{path}: {error}")))?;
            if is_vgpu(path) || is_vgpu_header(&header) {
                return Err(vgpu(path));
            }
            check_version(path, version_in_name(path), version_in_header(&header), version)?;
        }
        Source::Url(url) if is_vgpu(url) => return Err(vgpu(url)),
        Source::Url(url) => check_version(url, version_in_name(url), None, version)?,
    }
    Ok(source)
}

/// Downloads it where it is not here yet, and checks its sum where one is configured.
///
/// # Errors
/// What is wrong with it.
pub fn fetch(app: &App, source: &Source, config: &Driver, version: &str, teller: &Teller) -> Result<Installer> {
    let kernel = app.kernel;
    let path = match source {
        Source::File(path) => path.clone(),
        Source::Url(url) => {
            let path = format!("{CACHE}/{}", file_name(version));
            let part = format!("{path}.part");
            download(app, url, &part, teller)?;
            let have = sum(app, &part)?;
            let header = header(app, &part).unwrap_or_default();
            let is_right = check_sum(url, &have, config)
                .and_then(|()| check_version(url, None, version_in_header(&header), version));
            if let Err(exit) = is_right {
                // The next run must not go on with it.
                let _ = kernel.remove_file(&part);
                return Err(exit);
            }
            note_download(app, &file_name(version))?;
            kernel.rename_file(&part, &path).map_err(|error| Exit::failed(format!("{path}: {error}")))?;
            path
        }
    };
    let sha256 = sum(app, &path)?;
    check_sum(&path, &sha256, config)?;
    Ok(Installer { path, name: file_name(version), version: version.to_string(), sha256 })
}

fn note_download(app: &App, name: &str) -> Result<()> {
    let mut names = app.kernel.text(DOWNLOADED).unwrap_or_default();
    if names.lines().any(|other| other == name) {
        return Ok(());
    }
    if !names.is_empty() {
        names.push('\n');
    }
    app.kernel
        .write_file(DOWNLOADED, format!("{names}{name}\n").as_bytes(), 0o644)
        .map_err(|error| Exit::failed(format!("{DOWNLOADED}: {error}")))
}

/// Keeps an installer in [`CACHE`]: for kernels that are yet to come, for containers, and for the way back.
///
/// # Errors
/// When it could not be copied whole.
pub fn keep(app: &App, installer: Installer) -> Result<Installer> {
    let kept = format!("{CACHE}/{}", installer.name);
    if installer.path == kept {
        return Ok(installer);
    }
    let failed = |error: io::Error| Exit::failed(format!("{} could not be copied to {kept}: {error}", installer.path));
    let part = format!("{kept}.part");
    let kernel = app.kernel;
    kernel.make_folder(CACHE).and_then(|()| kernel.remove_file(&part)).map_err(failed)?;
    let copied = kernel.copy_file(&installer.path, &part).map_err(failed);
    let is_right = copied.and_then(|()| match sum(app, &part)? {
        sum if sum == installer.sha256 => kernel.rename_file(&part, &kept).map_err(failed),
        _ => Err(Exit::failed(format!("{} changed while it was copied to {kept}", installer.path))),
    });
    if is_right.is_err() {
        let _ = kernel.remove_file(&part);
    }
    is_right.map(|()| Installer { path: kept, ..installer })
}

/// To a file in [`CACHE`], going on where an earlier download ended, if the server lets it.
///
/// # Errors
/// Curl's words.
pub fn download(app: &App, url: &str, to: &str, teller: &Teller) -> Result<()> {
    let target = app.kernel.path(to);
    app.kernel.make_folder(CACHE).map_err(|error| Exit::failed(format!("{CACHE}: {error}")))?;
    let had = fs::metadata(&target).is_ok_and(|file| file.len() > 0);
    let target = target.to_string_lossy();
    let arguments = [
        "--fail",
        "--location",
        "--silent",
        "--show-error",
        "--connect-timeout",
        "30",
        // Nothing at all for five minutes.
        "--speed-limit",
        "1",
        "--speed-time",
        "300",
        "--retry",
        "2",
        "--continue-at",
        "-",
        "--output",
        &target,
        "--",
        url,
    ];
    let so_far = || {
        let bytes = fs::metadata(app.kernel.path(to)).map_or(0, |file| file.len());
        format!("{} MiB so far", bytes / (1024 * 1024))
    };
    let download = || teller.run(&format!("downloading {url}"), CURL, &arguments, DOWNLOAD, &so_far);
    let mut done = download();
    if had && done.as_ref().is_err_and(|exit| NO_REST.iter().any(|words| exit.trouble.what.contains(words))) {
        let _ = app.kernel.remove_file(to);
        done = download();
    }
    done.map_err(|exit| exit.and("is the network up, and the address right?"))
}

fn header(app: &App, path: &str) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    File::open(app.kernel.path(path))?.take(HEADER).read_to_end(&mut header)?;
    Ok(header)
}

fn sum(app: &App, path: &str) -> Result<String> {
    let real = app.kernel.path(path);
    let said = app.kernel.program(SHA256SUM, &["--", &real.to_string_lossy()], SUMMING);
    let said = said.map_err(|error| Exit::failed(format!("{path}: {error}")))?;
    // A backslash stands before the sum when the name has one.
    let sum = said.trim_start_matches('\\').split_whitespace().next().unwrap_or_default();
    if is_sum(sum) { Ok(sum.to_string()) } else { Err(Exit::failed(format!("{path}: sha256sum says no sum"))) }
}

fn check_sum(what: &str, have: &str, config: &Driver) -> Result<()> {
    match &config.sha256 {
        Some(wanted) if !wanted.eq_ignore_ascii_case(have) => Err(Exit::failed(format!(
            "{what}: checksum mismatch: it is {have}, driver.sha256 says {wanted}; nothing was installed"
        ))),
        _ => Ok(()),
    }
}

fn is_sum(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `NVIDIA-Linux-x86_64-550.90.05-vgpu-kvm.run`: NVIDIA's vGPU manager.
fn is_vgpu(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|name| name.contains("-vgpu-kvm"))
}

fn is_vgpu_header(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.any(|line| (line.starts_with("targetdir=") || line.starts_with("label=")) && line.contains("vgpu-kvm"))
}

/// What to do about it is in the words already: `container check`, which would touch nothing anyway, tells those alone.
fn untouched(why: String) -> Exit {
    Exit::refused(Trouble::new(why, "nothing was touched"))
}

fn vgpu(path: &str) -> Exit {
    untouched(format!(
        "{path} is NVIDIA's vGPU manager, which cuts a card into slices for VMs: with it neither the host nor a container has \
         CUDA, and a whole card cannot be handed over; take the driver itself, NVIDIA-Linux-x86_64-VERSION.run"
    ))
}

pub fn file_name(version: &str) -> String {
    format!("NVIDIA-Linux-x86_64-{version}.run")
}

fn check_version(what: &str, name: Option<String>, header: Option<String>, wanted: &str) -> Result<()> {
    for version in [&header, &name].into_iter().flatten() {
        if version != wanted {
            let why = format!("{what}: wrong installer version: it is {version}, wanted is {wanted}");
            return Err(untouched(why));
        }
    }
    // An address need not end in the file's name; what comes from there is looked at again.
    if name.is_none() && header.is_none() && !what.contains("://") {
        return Err(untouched(format!("{what} is no installer of NVIDIA's driver")));
    }
    Ok(())
}

/// `580.95.05` of `…/NVIDIA-Linux-x86_64-580.95.05.run`, also with something after the version, such as `-grid`.
fn version_in_name(path: &str) -> Option<String> {
    let name = path.split(['?', '#']).next()?.rsplit('/').next()?;
    leading_version(name.strip_prefix("NVIDIA-Linux-x86_64-")?)
}

/// As makeself writes it into the script that the file begins with: `targetdir="NVIDIA-Linux-x86_64-580.95.05"`, or the
/// last word of the label.
fn version_in_header(bytes: &[u8]) -> Option<String> {
    let values = |key: &'static str| {
        bytes.split(|byte| *byte == b'\n').filter_map(move |line| {
            let value = std::str::from_utf8(line).ok()?.strip_prefix(key)?;
            Some(value.trim().trim_matches(['"', '\'']))
        })
    };
    values("targetdir=")
        .find_map(|value| leading_version(value.strip_prefix("NVIDIA-Linux-x86_64-")?))
        .or_else(|| values("label=").find_map(|value| leading_version(value.rsplit(' ').next()?)))
}

fn leading_version(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let version = text[..end].trim_end_matches('.');
    (version.contains('.') && version.parse::<Version>().is_ok()).then(|| version.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_a_name_tells() {
        for (name, version) in [
            ("/root/NVIDIA-Linux-x86_64-580.95.05.run", Some("580.95.05")),
            ("http://a/b/NVIDIA-Linux-x86_64-550.90.run?x=1", Some("550.90")),
            ("NVIDIA-Linux-x86_64-550.90.07-grid.run", Some("550.90.07")),
            ("/root/driver.run", None),
            ("/NVIDIA-Linux-x86_64-580.95.05.run/x", None),
            ("NVIDIA-Linux-x86_64-.run", None),
        ] {
            assert_eq!(version_in_name(name).as_deref(), version, "{name}");
        }
    }

    #[test]
    fn the_version_that_a_header_tells() {
        let header = |line: &str| version_in_header(format!("#!/bin/sh\n# x\n{line}\nskip=\"3\"\n\u{0}").as_bytes());
        assert_eq!(header("targetdir=\"NVIDIA-Linux-x86_64-580.95.05\"").as_deref(), Some("580.95.05"));
        assert_eq!(header("targetdir=NVIDIA-Linux-x86_64-390.48").as_deref(), Some("390.48"));
        let label = "label=\"NVIDIA Accelerated Graphics Driver for Linux-x86_64 570.86.16\"";
        assert_eq!(header(label).as_deref(), Some("570.86.16"));
        assert_eq!(header("label=\"something else\""), None);
        assert_eq!(version_in_header(b"\x7fELF\xff\xfe\n"), None);
    }

    #[test]
    fn name_and_header_must_both_be_of_the_hosts_version() {
        let check = |name: Option<&str>, header: Option<&str>| {
            check_version("/x.run", name.map(str::to_string), header.map(str::to_string), "580.95.05")
                .map_err(|exit| exit.to_string())
        };
        assert_eq!(check(Some("580.95.05"), Some("580.95.05")), Ok(()));
        assert_eq!(check(None, Some("580.95.05")), Ok(()));
        assert_eq!(check(Some("580.95.05"), None), Ok(()));
        for (name, header) in
            [(Some("580.95.05"), Some("570.26")), (Some("570.26"), None), (Some("570.26"), Some("580.95.05"))]
        {
            let message = check(name, header).unwrap_err();
            assert!(message.contains("wrong installer version: it is 570.26, wanted is 580.95.05"), "{message}");
        }
        assert!(check(None, None).unwrap_err().contains("is no installer"));
    }
}
