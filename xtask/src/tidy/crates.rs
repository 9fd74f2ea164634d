//! Rules for the workspace as a whole: ARCHITECTURE.md is its map, crates depend on each other in
//! one direction only, and every dependency from outside has a reason.

use std::collections::BTreeMap;

use anyhow::Context;

use super::{Findings, Source};
use crate::build::workspace;

const MAP: &str = "ARCHITECTURE.md";
const XTASK: &str = "xtask/Cargo.toml";
const REASONS: &str = "docs/dependencies.md";

/// What each crate may depend on, tests apart. What is not here is what the design forbids: pager
/// and remote have never heard of each other, region and vmem know nothing of the network.
const MAY_DEPEND_ON: [(&str, &[&str]); 15] = [
    ("client", &["pager", "region", "remote", "transport", "vmem", "wire"]),
    (
        "farmem",
        &["client", "memserver", "region", "remote", "supervise", "transport", "vmem", "wire"],
    ),
    ("memserver", &["region", "transport", "vmem", "wire"]),
    ("pageload", &["region", "wire", "workloads"]),
    ("pager", &["region", "vmem"]),
    ("pagerd", &["client", "pager", "region", "remote", "supervise", "transport", "vmem", "wire"]),
    ("preload", &["supervise"]),
    ("region", &[]),
    ("remote", &["region", "transport", "vmem", "wire"]),
    ("sim", &["memserver", "pager", "region", "remote", "transport", "vmem", "wire"]),
    ("supervise", &[]),
    ("transport", &["region", "wire"]),
    ("vmem", &["region"]),
    ("wire", &["region"]),
    ("workloads", &[]),
];

pub(super) fn check(sources: &[Source], findings: &mut Findings) -> anyhow::Result<()> {
    let manifests: BTreeMap<&str, &str> = sources
        .iter()
        .filter_map(|source| {
            let name = source.path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml")?;
            Some((name, source.text.as_str()))
        })
        .collect();
    check_map(sources, manifests.keys(), findings);
    for (name, manifest) in &manifests {
        check_direction(name, manifest, findings);
    }
    let root = &text_of(sources, "Cargo.toml").context("no Cargo.toml")?;
    check_reasons(root, text_of(sources, REASONS), findings);
    let members: String = manifests.values().copied().chain(text_of(sources, XTASK)).collect();
    let used = |name: &&str| {
        let ways = ["{name}.workspace = true", "{name} = { workspace = true"];
        ways.iter().any(|way| members.contains(&way.replace("{name}", &format!("\n{name}"))))
    };
    for name in dependencies_of(root).filter(|name| !used(name)) {
        findings.push(format!("Cargo.toml: no crate uses {name}"));
    }
    Ok(())
}

fn text_of<'a>(sources: &'a [Source], path: &str) -> Option<&'a str> {
    sources.iter().find(|source| source.path == path).map(|source| source.text.as_str())
}

/// The map names every crate, and every path in it exists.
fn check_map<'a>(
    sources: &[Source],
    crates: impl Iterator<Item = &'a &'a str>,
    findings: &mut Findings,
) {
    let Some(map) = text_of(sources, MAP) else {
        findings.push(format!("{MAP} is missing"));
        return;
    };
    for name in crates.filter(|name| !map.contains(&format!("crates/{name}"))) {
        findings.push(format!("{MAP} does not name crates/{name}"));
    }
    for path in paths_in(map).filter(|path| !workspace().join(path).exists()) {
        findings.push(format!("{MAP} names {path}, which does not exist"));
    }
}

/// What stands between backticks and begins with a folder of this workspace.
fn paths_in(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    let folders = ["crates/", "docs/", "xtask/", ".ci/", "fuzz/"];
    quoted.filter(move |path| {
        folders.iter().any(|folder| path.starts_with(folder))
            && !path.contains(|c: char| c.is_whitespace() || "*{<".contains(c))
    })
}

fn check_direction(name: &str, manifest: &str, findings: &mut Findings) {
    let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(listed, _)| *listed == name) else {
        findings.push(format!("crates/{name}: say in tidy what it may depend on"));
        return;
    };
    let dependencies = section(manifest, "dependencies")
        .filter_map(|line| line.strip_prefix("farmem-")?.split(['.', ' ', '=']).next());
    for dependency in dependencies.filter(|dependency| !allowed.contains(dependency)) {
        findings.push(format!("crates/{name} must not depend on {dependency}"));
    }
}

fn check_reasons(root: &str, reasons: Option<&str>, findings: &mut Findings) {
    let Some(reasons) = reasons else {
        findings.push(format!("{REASONS} is missing"));
        return;
    };
    for name in dependencies_of(root).filter(|name| !reasons.contains(&format!("`{name}`"))) {
        findings.push(format!("{REASONS} does not say what {name} is for"));
    }
}

/// What the workspace takes from outside.
fn dependencies_of(root: &str) -> impl Iterator<Item = &str> {
    let names = section(root, "workspace.dependencies");
    let names = names.filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| !name.is_empty() && !name.starts_with("farmem-"))
}

/// The lines of one section of a manifest.
fn section<'a>(manifest: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let head = format!("[{name}]");
    let lines = manifest.lines().skip_while(move |line| *line != head).skip(1);
    lines.take_while(|line| !line.starts_with('['))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_what_begins_with_our_folders() {
        let text = "`crates/pager/src/lib.rs` and `crates/*` and `pager` and `docs/x.md`";
        let found: Vec<_> = paths_in(text).collect();
        assert_eq!(found, ["crates/pager/src/lib.rs", "docs/x.md"]);
    }

    #[test]
    fn a_dependency_against_the_direction_is_found() {
        let check = |name, manifest| {
            let mut findings = Findings::new();
            check_direction(name, manifest, &mut findings);
            findings
        };
        let manifest = "[dependencies]\nfarmem-remote.workspace = true\n";
        assert_eq!(check("pager", manifest), ["crates/pager must not depend on remote"]);
        assert_eq!(check("client", manifest), Findings::new());
        let in_tests = "[dependencies]\n[dev-dependencies]\nfarmem-remote.workspace = true\n";
        assert_eq!(check("pager", in_tests), Findings::new());
        assert_eq!(check("unheard", manifest).len(), 1);
    }

    #[test]
    fn a_dependency_without_a_reason_is_found() {
        let root = "[workspace.dependencies]\nfarmem-wire = { path = \"x\" }\nlibc = \"0.2\"\n";
        let mut findings = Findings::new();
        check_reasons(root, Some("`libc`: the kernel"), &mut findings);
        assert_eq!(findings, Findings::new());
        check_reasons(root, Some("libcrux"), &mut findings);
        assert_eq!(findings.len(), 1);
    }
}
