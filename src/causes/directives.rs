//! In modprobe's configuration.

use super::cause::{Cause, Effect, keeps_away, replace, take_out, without};
use super::facts::{Facts, Function};
use super::ids::{addresses, is_keeper, split_ids};
use super::{cmdline, glob, scripts};
use crate::modprobe::Line;

pub fn find(facts: &Facts) -> Vec<Cause> {
    let mut found: Vec<Cause> = facts.directives.iter().filter_map(|line| one(facts, line)).collect();
    let ids = |cause: &Cause| cause.id == "static-ids";
    if found.iter().any(ids) || cmdline::find(facts).iter().any(ids) {
        found.extend(facts.directives.iter().filter_map(first));
    }
    found
}

fn one(facts: &Facts, line: &Line) -> Option<Cause> {
    let place = &line.place;
    let whole = || take_out(&place.path, place.first, place.last);
    let cause = |id, effect, does: String, remedy: String| Cause {
        id,
        effect,
        place: place.to_string(),
        text: line.words.join(" "),
        does,
        remedy,
    };
    match line.words().as_slice() {
        ["options", name, options @ ..] if is_keeper(name) => {
            let list = options.iter().find_map(|option| option.trim_matches('"').strip_prefix("ids="))?;
            let (taken, rest) = split_ids(list, &facts.functions);
            if taken.is_empty() {
                return None;
            }
            let is_packages = whole().starts_with("ln ");
            // Others' devices stay where they are.
            let remedy = match rest.as_str() {
                "" => whole(),
                _ if is_packages => format!("copy it to /etc/modprobe.d with ids={rest}"),
                // A line that goes on has it anywhere.
                _ if place.first == place.last => replace(&place.path, place.first, list, &rest),
                _ => format!("sed -i 's|{list}|{rest}|' {}", place.path),
            };
            Some(cause("static-ids", Effect::Takes, format!("gives {} to {name} at boot", addresses(&taken)), remedy))
        }
        ["blacklist", name] if facts.needs(name) => {
            Some(cause("blacklist", keeps_away(name), without(name, " at boot"), whole()))
        }
        ["install", name, command @ ..] if facts.needs(name) && !loads(facts, command) => {
            Some(cause("install", keeps_away(name), without(name, ""), whole()))
        }
        // A script that binds the card runs whenever vfio-pci is loaded.
        ["install", name, command @ ..] if is_keeper(name) => {
            let script = scripts::called(&facts.scripts, command)?;
            scripts::binds(&script.text, &facts.functions)?;
            Some(cause("bound-by-install", Effect::Takes, "gives the card to vfio-pci by that script".into(), whole()))
        }
        ["alias", pattern, target] => {
            let is_off = *target == "off" || *target == "null" || *target == "/bin/true";
            if facts.needs(pattern) && *target != *pattern && !facts.needs(target) {
                return Some(cause("alias", keeps_away(pattern), without(pattern, ""), whole()));
            }
            let fits = |function: &&Function| glob::fits(pattern.as_bytes(), function.modalias.as_bytes());
            let taken: Vec<&Function> = facts.gpu().filter(fits).collect();
            ((is_off || is_keeper(target)) && pattern.starts_with("pci:") && !taken.is_empty()).then(|| {
                let does = format!("has {target} loaded for {} instead of its driver", addresses(&taken));
                cause("alias", Effect::KeepsAway, does, whole())
            })
        }
        _ => None,
    }
}

/// `softdep nvidia pre: vfio-pci`: with ids, vfio-pci has the card by then.
fn first(line: &Line) -> Option<Cause> {
    match line.words().as_slice() {
        ["softdep", name, dependencies @ ..] => {
            let before =
                dependencies.iter().skip_while(|word| **word != "pre:").skip(1).take_while(|word| **word != "post:");
            let keeper = before.into_iter().find(|word| is_keeper(word))?;
            Some(Cause {
                id: "softdep",
                effect: Effect::Takes,
                place: line.place.to_string(),
                text: line.words.join(" "),
                does: format!("has {keeper} come before {name}, with those ids"),
                remedy: take_out(&line.place.path, line.place.first, line.place.last),
            })
        }
        _ => None,
    }
}

/// Whether an `install` command loads the driver in the end: what calls modprobe or insmod for it does.
fn loads(facts: &Facts, command: &[&str]) -> bool {
    let is_loader = |word: &str| {
        let name = word.trim_start_matches(['(', '{', '"', '\'']).rsplit('/').next().unwrap_or_default();
        matches!(name, "modprobe" | "insmod" | "kmod")
    };
    if let Some(at) = command.iter().position(|word| is_loader(word)) {
        return command
            .iter()
            .skip(at)
            .any(|word| facts.needs(word.trim_matches([';', '"', '\''])) || word.ends_with(".ko"));
    }
    // A script of the administrator's may do anything; one that loads nothing does not.
    let script = scripts::called(&facts.scripts, command);
    script.is_some_and(|script| script.text.split_whitespace().any(is_loader))
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;
    use crate::modprobe;

    fn ids(text: &str) -> Vec<&'static str> {
        let facts = Facts { directives: modprobe::parse("/etc/modprobe.d/x.conf", text), ..facts() };
        find(&facts).iter().map(|cause| cause.id).collect()
    }

    #[test]
    fn whatever_keeps_a_module_away() {
        for line in [
            "blacklist nvidia",
            "blacklist nvidia-drm",
            "blacklist nvidia_uvm",
            "blacklist nvidia_modeset",
            "blacklist nvidia-current-open",
        ] {
            assert_eq!(ids(line), ["blacklist"], "{line}");
        }
        for line in [
            "install nvidia /bin/false",
            "install nvidia /usr/bin/true",
            "install nvidia-drm exit 0",
            "install nvidia :",
            "install nvidia /sbin/modprobe vfio-pci",
            "install nvidia /usr/local/bin/nobody-knows",
        ] {
            assert_eq!(ids(line), ["install"], "{line}");
        }
        for line in ["alias nvidia off", "alias nvidia_drm off", "alias pci:v000010DEd*sv*sd*bc03sc*i* off"] {
            assert_eq!(ids(line), ["alias"], "{line}");
        }
        for line in [
            "# blacklist nvidia",
            "blacklist nvidiafb",
            "blacklist nouveau",
            "options nvidia NVreg_x=1",
            "install nvidia /sbin/modprobe -i nvidia",
            "install nvidia modprobe -i nvidia-current $CMDLINE_OPTS",
            "install nvidia-uvm modprobe nvidia ; modprobe -i nvidia-current-uvm $CMDLINE_OPTS",
            "alias char-major-195* nvidia",
            "alias pci:v000010DEd*sv*sd*bc03sc00i00* nvidia",
            "softdep nvidia pre: vfio-pci",
            "options vfio-pci ids=8086:1572 disable_vga=1",
            "options vfio-pci ids=10de:1b80",
        ] {
            assert!(ids(line).is_empty(), "{line}");
        }
    }

    #[test]
    fn ids_in_every_form_and_what_comes_first_with_them() {
        for list in [
            "10de:2684",
            "8086:1572,10DE:22BA",
            "10de:ffffffff:ffffffff:ffffffff:00030000:ffff00ff",
            "ffffffff:ffffffff:ffffffff:ffffffff:00030000:00ff0000",
            "10de:2684:1043:88e2",
        ] {
            assert_eq!(ids(&format!("options vfio-pci ids={list}")), ["static-ids"], "{list}");
        }
        for list in ["10de:2684:1043:0000", "10de:ffffffff:ffffffff:ffffffff:00020000:ffff00ff", "10de"] {
            assert!(ids(&format!("options vfio-pci ids={list}")).is_empty(), "{list}");
        }
        assert_eq!(
            ids("options vfio_pci \\\n ids=10de:2684\nsoftdep nvidia pre: vfio-pci\nsoftdep nvidia post: vfio-pci\n"),
            ["static-ids", "softdep"]
        );
        assert_eq!(ids("options pci-stub ids=10de:2684"), ["static-ids"]);
    }

    #[test]
    fn what_is_taken_out_leaves_the_rest() {
        let remedy = |path: &str, text: &str| {
            let facts = Facts { directives: modprobe::parse(path, text), ..facts() };
            find(&facts)[0].remedy.clone()
        };
        assert_eq!(remedy("/etc/modprobe.d/x.conf", "\nblacklist nvidia"), "sed -i '2s/^/# /' /etc/modprobe.d/x.conf");
        assert_eq!(
            remedy("/etc/modprobe.d/x.conf", "options vfio-pci \\\nids=10de:2684"),
            "sed -i '1,2s/^/# /' /etc/modprobe.d/x.conf"
        );
        assert_eq!(remedy("/usr/lib/modprobe.d/x.conf", "alias nvidia off"), "ln -s /dev/null /etc/modprobe.d/x.conf");
        assert_eq!(
            remedy("/etc/modprobe.d/x.conf", "options vfio-pci ids=8086:1572,10de:2684,10de:22ba"),
            "sed -i '1s|\\<8086:1572,10de:2684,10de:22ba\\>|8086:1572|' /etc/modprobe.d/x.conf"
        );
    }
}
