//! Where a process runs, read from its cgroup, and what ends it for good: a process that somebody starts again is not
//! ended by killing it, and some may not be killed at all. Pure, but for the files that logind writes.

use crate::sys::{DeviceNumber, Kernel, User};

/// Where a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Container(u32),
    Vm(u32),
    Unit(String),
    Unknown,
}

/// What makes a process let go, and not come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ends {
    Container(u32),
    Vm(u32),
    /// A unit of the host's systemd.
    Service(String),
    /// It ends by itself, in a moment: udev's.
    Passes,
    /// A command that only a person may type, and what of that does not show in it; often nothing.
    Typed(String, String),
    /// Something that only a person can do, in words.
    Told(String),
    /// Nobody starts it again.
    Kill,
}

/// Units in which others' processes run: stopping one would end far more than what uses the GPU, down to the very task
/// that starts the VM. What uses the GPU there counts as a mere process.
const MACHINERY: [&str; 9] =
    ["pve", "qmeventd", "spiceproxy", "ssh", "user@", "systemd-", "dbus", "getty@", "serial-getty@"];

/// Its workers open what they are told of, for a moment.
const UDEV: &str = "systemd-udevd.service";

/// Keeps the screens' nodes of every session open, for itself and, over its own restarts, in PID 1.
const LOGIND: &str = "systemd-logind.service";

const SESSIONS: &str = "/run/systemd/sessions";

/// One that systemd can stop and start again: a scope, such as a login session, is gone for good when it is stopped.
pub fn is_service(unit: &str) -> bool {
    let is_machinery = MACHINERY.iter().any(|begin| unit.starts_with(begin)) && !unit.starts_with("systemd-nspawn@");
    unit.ends_with(".service") && !is_machinery
}

/// Somebody who was given a cgroup may name those below it as he likes: what systemd could not have named is no unit
/// that systemd could stop.
fn is_unit(name: &str) -> bool {
    (name.ends_with(".service") || name.ends_with(".scope")) && is_plain(name)
}

/// Nothing that a shell would take for something else.
fn is_plain(name: &str) -> bool {
    !name.starts_with('-') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

/// The components of the unified hierarchy's line of `/proc/PID/cgroup`: `0::/qemu.slice/111.scope`, `0::/lxc/101/ns/…`.
fn parts(cgroup: &str) -> Vec<&str> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    path.split('/').filter(|part| !part.is_empty()).collect()
}

impl Place {
    pub fn of(cgroup: &str) -> Place {
        let parts = parts(cgroup);
        // Only where Proxmox puts them: below, whoever was given a cgroup of his own names what he likes.
        if let [first, second, ..] = parts[..] {
            if let ("lxc", Ok(id)) = (first, second.parse()) {
                return Place::Container(id);
            }
            if let ("qemu.slice", Some(Ok(id))) = (first, second.strip_suffix(".scope").map(str::parse)) {
                return Place::Vm(id);
            }
        }
        // Plain lxc-start, without Proxmox's lxc.cgroup.dir, names the payload itself.
        if let Some(Ok(id)) = parts.first().and_then(|part| part.strip_prefix("lxc.payload.")).map(str::parse) {
            return Place::Container(id);
        }
        // The outermost is systemd's; below it is what that unit makes of its cgroup.
        match parts.iter().find(|part| is_unit(part)) {
            Some(unit) => Place::Unit((*unit).to_string()),
            None => Place::Unknown,
        }
    }
}

impl Ends {
    /// `number`: of the device that it has open.
    pub fn of(kernel: &dyn Kernel, user: &User, place: &Place, number: DeviceNumber) -> Ends {
        let unit = match place {
            Place::Container(id) => return Ends::Container(*id),
            Place::Vm(id) => return Ends::Vm(*id),
            Place::Unit(unit) => unit.as_str(),
            Place::Unknown => "",
        };
        if user.process.pid == 1 || unit == LOGIND {
            return end_of_session(kernel, number);
        }
        if unit == UDEV {
            return Ends::Passes;
        }
        let parts = parts(&user.cgroup);
        if parts.iter().any(|part| part.starts_with("kubepods")) {
            return Ends::Told("delete its pod: kubectl get pods --all-namespaces tells which there are".to_string());
        }
        if let Some(command) = of_runtime(&parts).or_else(|| of_user(&parts)) {
            return Ends::typed(command);
        }
        if is_service(unit) {
            return Ends::Service(unit.to_string());
        }
        if user.is_init {
            return Ends::Told(format!(
                "stop what started it: PID {} is the first process of a namespace, and all in there ends with it",
                user.process.pid
            ));
        }
        // Whoever started a display server for its screen starts it again.
        let session = unit.strip_prefix("session-").and_then(|rest| rest.strip_suffix(".scope"));
        let manager = session.and_then(|id| Session::read(kernel, id)).is_some_and(|session| session.has_manager());
        if manager && matches!(user.command.as_str(), "X" | "Xorg") {
            return Ends::typed(STOP_MANAGER.to_string());
        }
        Ends::Kill
    }

    /// What to type; none where words must do. Guests are asked to shut down, as the policy asks them.
    pub fn command(&self, pid: i32) -> Option<String> {
        Some(match self {
            Ends::Container(id) => format!("pct shutdown {id}"),
            Ends::Vm(id) => format!("qm shutdown {id}"),
            Ends::Service(name) => format!("systemctl stop {name}"),
            Ends::Passes => "udevadm settle".to_string(),
            Ends::Typed(command, _) => command.clone(),
            Ends::Told(_) => return None,
            Ends::Kill => format!("kill {pid}"),
        })
    }

    fn typed(command: String) -> Ends {
        Ends::Typed(command, String::new())
    }
}

/// Docker, Podman and LXC without Proxmox keep what they run running. Only where root put them: below a unit,
/// whoever was given it names what he likes.
fn of_runtime(parts: &[&str]) -> Option<String> {
    let own = parts.iter().find(|part| !part.ends_with(".slice"))?;
    let name = own.strip_suffix(".scope").unwrap_or(own);
    let id = |begin: &str| {
        let id = name.strip_prefix(begin)?;
        (id.len() >= 12 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id[..12].to_string())
    };
    let below = |first: &str| parts.first() == Some(&first) && parts.len() > 1;
    if let Some(id) = id("docker-") {
        return Some(format!("docker stop {id}"));
    }
    if let Some(id) = parts.get(1).filter(|id| below("docker") && id.len() >= 12 && is_plain(id)) {
        return Some(format!("docker stop {}", id.get(..12)?));
    }
    if let Some(id) = id("libpod-") {
        return Some(format!("podman stop {id}"));
    }
    let lxc = parts.first()?.strip_prefix("lxc.payload.").filter(|name| is_plain(name))?;
    Some(format!("lxc-stop --name {lxc}"))
}

/// A unit of a user's own systemd: `user.slice/user-1000.slice/user@1000.service/app.slice/x.service`.
fn of_user(parts: &[&str]) -> Option<String> {
    let mut parts = parts.iter();
    let user = parts.find_map(|part| part.strip_prefix("user@")?.strip_suffix(".service"))?;
    let uid: u32 = user.parse().ok()?;
    let unit = parts.find(|part| !part.ends_with(".slice") && is_unit(part))?;
    match *unit {
        "init.scope" => Some(format!("loginctl terminate-user {uid}")),
        unit if unit.ends_with(".service") => Some(format!("systemctl --user --machine={uid}@.host stop {unit}")),
        _ => None,
    }
}

const STOP_MANAGER: &str = "systemctl stop display-manager.service";

/// What logind keeps of a session in `/run/systemd/sessions`.
struct Session {
    id: String,
    user: String,
    /// What it was opened by: `login`, `sshd`, `gdm-password`.
    service: String,
    class: String,
    devices: Vec<DeviceNumber>,
}

impl Session {
    fn read(kernel: &dyn Kernel, id: &str) -> Option<Session> {
        let text = kernel.text(&format!("{SESSIONS}/{id}")).filter(|_| is_plain(id))?;
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or("");
        Some(Session {
            id: id.to_string(),
            user: value("USER").to_string(),
            service: value("SERVICE").to_string(),
            class: value("CLASS").to_string(),
            devices: value("DEVICES").split_whitespace().filter_map(|word| word.parse().ok()).collect(),
        })
    }

    /// A display manager opened it, and shows its own screen again when it ends.
    fn has_manager(&self) -> bool {
        let managers = ["gdm", "sddm", "lightdm", "lxdm", "xdm", "slim", "greetd", "ly"];
        self.class == "greeter" || managers.iter().any(|name| self.service.starts_with(name))
    }
}

/// How to end the session for which logind, or PID 1 in its place, has a device open.
fn end_of_session(kernel: &dyn Kernel, number: DeviceNumber) -> Ends {
    let names = kernel.list(SESSIONS);
    let sessions = names.iter().filter(|name| !name.ends_with(".ref")).filter_map(|id| Session::read(kernel, id));
    match sessions.into_iter().find(|session| session.devices.contains(&number)) {
        Some(session) if session.has_manager() => Ends::Typed(
            STOP_MANAGER.to_string(),
            format!("it holds the screen for session {} of user {}", session.id, session.user),
        ),
        Some(session) => Ends::Typed(
            format!("loginctl terminate-session {}", session.id),
            format!("it holds the screen for user {}", session.user),
        ),
        None => Ends::Told(
            "log out of the session that it holds the screen for: loginctl list-sessions shows it, loginctl \
             terminate-session ID ends it"
                .to_string(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Linux, Process};

    #[test]
    fn the_place_of_a_process() {
        assert_eq!(Place::of("0::/lxc/101/ns/system.slice/jellyfin.service"), Place::Container(101));
        assert_eq!(Place::of("0::/lxc.payload.101/init.scope"), Place::Container(101));
        assert_eq!(Place::of("0::/qemu.slice/111.scope"), Place::Vm(111));
        let unit = |name: &str| Place::Unit(name.to_string());
        let services = "1:name=x:/\n0::/system.slice/nvidia-persistenced.service";
        assert_eq!(Place::of(services), unit("nvidia-persistenced.service"));
        assert_eq!(Place::of("0::/user.slice/user-0.slice/session-3.scope"), unit("session-3.scope"));
        assert_eq!(Place::of("0::/system.slice/docker.service/x/inner.service"), unit("docker.service"));
        assert_eq!(Place::of("0::/user.slice/user@1000.service/x; reboot.service"), unit("user@1000.service"));
        assert_eq!(Place::of("0::/user.slice/u/qemu.slice/111.scope"), unit("111.scope"));
        let forged = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/lxc.payload.101";
        assert_eq!(Place::of(forged), unit("user@1000.service"));
        assert_eq!(Place::of("0::/a/lxc/101"), Place::Unknown);
        assert_eq!(Place::of("0::/"), Place::Unknown);
        assert_eq!(Place::of(""), Place::Unknown);
    }

    const NODE: DeviceNumber = DeviceNumber { major: 226, minor: 1 };

    fn ends(root: &Linux, pid: i32, command: &str, cgroup: &str, is_init: bool) -> Ends {
        let process = Process { pid, start: 1 };
        let user =
            User { process, command: command.into(), cgroup: format!("0::{cgroup}\n"), is_init, open: Vec::new() };
        Ends::of(root, &user, &Place::of(&user.cgroup), NODE)
    }

    #[test]
    fn what_ends_a_process_for_good() {
        let nothing = Linux::at(std::env::temp_dir().join("gpu-handoff-no-such-root"));
        let id = "0123456789abcdef0123456789abcdef";
        let user = "/user.slice/user-1000.slice/user@1000.service";
        for (cgroup, told) in [
            (format!("/system.slice/docker-{id}.scope"), "docker stop 0123456789ab"),
            (format!("/docker/{id}"), "docker stop 0123456789ab"),
            (format!("/machine.slice/libpod-{id}.scope/container"), "podman stop 0123456789ab"),
            ("/lxc.payload.web/system.slice/x.service".to_string(), "lxc-stop --name web"),
            (format!("{user}/app.slice/ollama.service"), "systemctl --user --machine=1000@.host stop ollama.service"),
            (format!("{user}/init.scope"), "loginctl terminate-user 1000"),
        ] {
            match ends(&nothing, 7, "x", &cgroup, true) {
                Ends::Typed(command, why) => assert_eq!((command.as_str(), why.as_str()), (told, ""), "{cgroup}"),
                other => panic!("{cgroup}: {other:?}"),
            }
        }
        let pod = format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope");
        let ends_of = |cgroup: &str| ends(&nothing, 7, "x", cgroup, true);
        assert!(matches!(ends_of(&pod), Ends::Told(how) if how.starts_with("delete its pod")));
        // What somebody calls a cgroup that he was given says nothing of others' containers.
        for cgroup in
            [format!("{user}/app.slice/docker-{id}.scope"), format!("/system.slice/x.service/docker-{id}.scope")]
        {
            let how = ends(&nothing, 7, "x", &cgroup, false);
            assert!(matches!(how, Ends::Kill | Ends::Service(_)), "{cgroup}: {how:?}");
        }
        let of = |cgroup: &str, is_init: bool| ends(&nothing, 7, "x", cgroup, is_init);
        assert_eq!(of("/system.slice/ollama.service", false), Ends::Service("ollama.service".to_string()));
        assert_eq!(
            of("/machine.slice/systemd-nspawn@x.service", true),
            Ends::Service("systemd-nspawn@x.service".into())
        );
        assert_eq!(of("/system.slice/systemd-udevd.service/udev", false), Ends::Passes);
        assert_eq!(of("/user.slice/user-0.slice/session-3.scope", false), Ends::Kill);
        assert_eq!(of("/system.slice/pvedaemon.service", false), Ends::Kill);
        assert_eq!(of("/", false), Ends::Kill);
        assert!(matches!(of("/", true), Ends::Told(how) if how.starts_with("stop what started it")));
    }

    #[test]
    fn who_holds_a_screen_for_a_session() {
        let path = std::env::temp_dir().join(format!("gpu-handoff-sessions-{}", std::process::id()));
        let sessions = path.join("run/systemd/sessions");
        std::fs::create_dir_all(&sessions).unwrap();
        let root = Linux::at(path.clone());
        let session = |id: &str, text: &str| std::fs::write(sessions.join(id), text).unwrap();
        let logind = || ends(&root, 700, "systemd-logind", "/system.slice/systemd-logind.service", false);
        assert!(matches!(logind(), Ends::Told(how) if how.starts_with("log out of the session")));
        session("1", "USER=root\nSERVICE=sshd\nCLASS=user\n");
        session("2", "USER=alice\nSERVICE=login\nCLASS=user\nDEVICES=13:64 226:1 \n");
        let typed = |command: &str, why: &str| Ends::Typed(command.to_string(), why.to_string());
        let terminate = typed("loginctl terminate-session 2", "it holds the screen for user alice");
        assert_eq!(logind(), terminate);
        assert_eq!(ends(&root, 1, "systemd", "/init.scope", false), terminate);
        session("2", "USER=alice\nSERVICE=gdm-password\nCLASS=user\nDEVICES=226:1\n");
        assert_eq!(logind(), typed(STOP_MANAGER, "it holds the screen for session 2 of user alice"));
        let session = "/user.slice/user-1000.slice/session-2.scope";
        assert_eq!(ends(&root, 9, "Xorg", session, false), typed(STOP_MANAGER, ""));
        assert_eq!(ends(&root, 9, "game", session, false), Ends::Kill);
        std::fs::remove_dir_all(path).unwrap();
    }
}
