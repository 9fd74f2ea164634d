//! `cargo xtask tidy`: rules of this workspace that no compiler knows. Each finding says where,
//! and what the rule is for.

mod crates;
mod sources;
mod tests_named;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::build::workspace;

/// What breaks a rule.
type Findings = Vec<String>;

/// A file of the repository.
struct Source {
    /// From the root of the workspace.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        has_extension(&self.path, "rs")
    }
}

/// Checks everything; prints each finding.
pub(crate) fn tidy() -> anyhow::Result<()> {
    let sources = sources()?;
    let mut findings = Findings::new();
    for source in &sources {
        sources::check(source, &mut findings);
    }
    crates::check(&sources, &mut findings)?;
    tests_named::check(&sources, &mut findings);
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    ensure!(findings.is_empty(), "{} findings", findings.len());
    Ok(())
}

/// All text files that git knows or would add.
fn sources() -> anyhow::Result<Vec<Source>> {
    let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").current_dir(workspace()).args(list).output();
    let output = output.context("run git ls-files")?;
    ensure!(output.status.success(), "git ls-files failed: {}", output.status);
    let paths = String::from_utf8(output.stdout).context("a path is not UTF-8")?;
    let mut sources = Vec::new();
    for path in paths.split_terminator('\0') {
        // A file that was deleted and not yet committed is listed and absent.
        let Ok(bytes) = fs::read(workspace().join(path)) else {
            continue;
        };
        if let Ok(text) = String::from_utf8(bytes) {
            sources.push(Source { path: path.to_owned(), text });
        }
    }
    Ok(sources)
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}
