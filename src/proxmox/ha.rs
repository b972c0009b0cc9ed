//! What HA may do with a guest (`/etc/pve/ha`), as PVE::HA::Config reads it.

use crate::sys::Kernel;

pub const RESOURCES: &str = "/etc/pve/ha/resources.cfg";

/// Of Proxmox VE 9, whose first start turns what was in groups into rules.
const RULES: &str = "/etc/pve/ha/rules.cfg";

const GROUPS: &str = "/etc/pve/ha/groups.cfg";

/// Whether it has this guest; `resource` is `vm` or `ct`.
pub fn manages(kernel: &dyn Kernel, resource: &str, id: u32) -> bool {
    let resources = kernel.text(RESOURCES).unwrap_or_default();
    sections(&resources).iter().any(|section| section.is(resource, &id.to_string()))
}

/// The only nodes on which it starts this guest; none where it may start it on any.
pub fn only_nodes(kernel: &dyn Kernel, resource: &str, id: u32) -> Option<Vec<String>> {
    let text = |path| kernel.text(path).unwrap_or_default();
    by_rules(&text(RULES), resource, id).or_else(|| by_group(&text(RESOURCES), &text(GROUPS), resource, id))
}

/// What makes it start this guest on none but these nodes.
pub fn keep_to(kernel: &dyn Kernel, resource: &str, id: u32, nodes: &str) -> String {
    let rules = kernel.text(RULES);
    let name =
        rules.as_deref().and_then(|rules| named_by(&sections(rules), resource, id).map(|rule| rule.name.to_string()));
    match (name, rules.is_some() || kernel.exists("/usr/share/perl5/PVE/HA/Rules.pm")) {
        (Some(name), _) => format!("ha-manager rules set node-affinity {name} --nodes {nodes} --strict 1"),
        (None, true) => format!(
            "ha-manager rules add node-affinity gpu-{id} --resources {resource}:{id} --nodes {nodes} --strict 1"
        ),
        (None, false) => format!(
            "ha-manager groupadd gpu-{id} --nodes {nodes} --restricted 1 && ha-manager set {resource}:{id} --group gpu-{id}"
        ),
    }
}

/// `node-affinity: NAME`, with `strict 1`. Where two of them name a guest HA heeds neither.
fn by_rules(rules: &str, resource: &str, id: u32) -> Option<Vec<String>> {
    let rules = sections(rules);
    named_by(&rules, resource, id).filter(|rule| rule.is_set("strict")).map(Section::nodes)
}

/// The one rule that counts for a guest.
fn named_by<'a, 'b>(rules: &'a [Section<'b>], resource: &str, id: u32) -> Option<&'a Section<'b>> {
    let whom = format!("{resource}:{id}");
    let names_it = |section: &Section| section.list("resources").any(|one| one == whom);
    let mut about = rules.iter().filter(|one| one.kind == "node-affinity" && !one.is_set("disable") && names_it(one));
    let rule = about.next()?;
    if about.next().is_some() { None } else { Some(rule) }
}

/// `group: NAME`, with `restricted 1`.
fn by_group(resources: &str, groups: &str, resource: &str, id: u32) -> Option<Vec<String>> {
    let resources = sections(resources);
    let name = resources.iter().find(|section| section.is(resource, &id.to_string()))?.value("group")?;
    let groups = sections(groups);
    let group = groups.iter().find(|section| section.is("group", name))?;
    group.is_set("restricted").then(|| group.nodes())
}

/// `vm: 111`, and what is indented below it.
struct Section<'a> {
    kind: &'a str,
    name: &'a str,
    lines: Vec<(&'a str, &'a str)>,
}

impl Section<'_> {
    fn is(&self, kind: &str, name: &str) -> bool {
        self.kind == kind && self.name == name
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.lines.iter().find(|(other, _)| *other == key).map(|(_, value)| *value)
    }

    /// PVE::JSONSchema::parse_boolean.
    fn is_set(&self, key: &str) -> bool {
        let value = self.value(key).unwrap_or_default();
        ["1", "on", "yes", "true"].iter().any(|word| value.eq_ignore_ascii_case(word))
    }

    /// PVE::Tools::split_list.
    fn list(&self, key: &str) -> impl Iterator<Item = &str> {
        let value = self.value(key).unwrap_or_default();
        value.split([',', ';', ' ', '\t']).filter(|one| !one.is_empty())
    }

    /// Each may have a priority behind it.
    fn nodes(&self) -> Vec<String> {
        self.list("nodes").map(|node| node.split(':').next().unwrap_or_default().to_string()).collect()
    }
}

/// PVE::SectionConfig::parse_config. One ends with an empty line.
fn sections(text: &str) -> Vec<Section<'_>> {
    let mut found: Vec<Section> = Vec::new();
    let mut is_in_one = false;
    for line in text.lines().map(str::trim_end).filter(|line| !line.trim_start().starts_with('#')) {
        if line.is_empty() {
            is_in_one = false;
        } else if line.starts_with(char::is_whitespace) {
            let line = line.trim_start();
            let property = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if let Some(section) = found.last_mut().filter(|_| is_in_one) {
                section.lines.push((property.0, property.1.trim_start()));
            }
        } else if let Some((kind, name)) = line.split_once(':') {
            is_in_one = true;
            found.push(Section { kind, name: name.trim_start(), lines: Vec::new() });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_a_section_of_its_own() {
        let resources = "vm: 111\n\tstate started\n\nct:101\n\tgroup a\n#vm: 113\n";
        let has = |kind: &str, name: &str| sections(resources).iter().any(|section| section.is(kind, name));
        assert!(has("vm", "111") && has("ct", "101"));
        assert!(!has("ct", "111") && !has("vm", "11") && !has("vm", "113"));
    }

    #[test]
    fn a_strict_rule_says_where_a_guest_may_be() {
        let rules = |more: &str| format!("node-affinity: gpu\n\tnodes pve1:2,pve3\n\tresources ct:1,vm:111\n{more}");
        let nodes = |text: &str| by_rules(text, "vm", 111);
        assert_eq!(nodes(&rules("\tstrict 1\n")), Some(vec!["pve1".to_string(), "pve3".to_string()]));
        assert_eq!(by_rules(&rules("\tstrict 1\n"), "vm", 11), None);
        for more in [
            "",
            "\tstrict 0\n",
            "\tstrict 1\n\tdisable 1\n",
            "\tstrict 1\n\n\tstrict 1\n\nnode-affinity: b\n\tnodes pve2\n\tresources vm:111\n",
        ] {
            assert_eq!(nodes(&rules(more)), None, "{more}");
        }
        // One that is disabled contradicts none, and one of another kind says nothing of nodes.
        let other = "\tstrict 1\n\nnode-affinity: b\n\tnodes pve2\n\tresources vm:111\n\tdisable\t1\n\n\
                     resource-affinity: c\n\taffinity negative\n\tresources vm:111,vm:112\n\tstrict 1\n";
        assert_eq!(nodes(&rules(other)).unwrap().len(), 2);
    }

    #[test]
    fn before_there_were_rules_a_group_did() {
        let resources = "vm: 111\n\tgroup gpu\n\nvm: 112\n";
        let groups = "group: other\n\tnodes pve9\n\trestricted 1\n\ngroup: gpu\n\tnodes pve2:1 pve1\n\trestricted 1\n";
        let nodes = by_group(resources, groups, "vm", 111);
        assert_eq!(nodes, Some(vec!["pve2".to_string(), "pve1".to_string()]));
        assert_eq!(by_group(resources, groups, "vm", 112), None);
        assert_eq!(by_group(resources, &groups.replace("restricted 1", "restricted 0"), "vm", 111), None);
    }
}
