//! When, and of which commit, a result is.

use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

/// What a recorded result is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Provenance {
    pub(crate) date: String,
    pub(crate) commit: String,
}

impl Provenance {
    /// Today, and the commit that is checked out: `-dirty` if what is run differs from it.
    ///
    /// Asked once: what runs was built when we started, whatever is checked out meanwhile.
    pub(crate) fn now() -> Self {
        static STARTED: OnceLock<Provenance> = OnceLock::new();
        STARTED.get_or_init(Self::ask).clone()
    }

    fn ask() -> Self {
        let mut commit = said_by("git", &["rev-parse", "--short=10", "HEAD"]).unwrap_or_default();
        let status =
            ["status", "--porcelain", "--untracked-files=no", "--", "crates", "xtask/suites"];
        if said_by("git", &status).is_ok_and(|changes| !changes.is_empty()) {
            commit += "-dirty";
        }
        Self { date: said_by("date", &["--utc", "+%Y-%m-%d"]).unwrap_or_default(), commit }
    }
}

impl std::fmt::Display for Provenance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.date, self.commit)
    }
}

fn said_by(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output().context("run it")?;
    ensure!(output.status.success(), "{program} failed");
    Ok(String::from_utf8(output.stdout).context("its output")?.trim().to_owned())
}
