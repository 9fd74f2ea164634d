//! How fast pages move between tiers, beside the bare compressor on the same pages, and what a working set
//! gains: tests of the server measure it and print what they found.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde::Serialize;

/// Ratios to the bare compressor's speed.
#[derive(Debug, Serialize)]
pub(crate) struct Tiers {
    pub(crate) demotion: f64,
    pub(crate) promotion: f64,
}

impl Tiers {
    pub(crate) fn measure() -> anyhow::Result<Self> {
        let text = test("FARMEM_MEASURE_TIERS", &["--lib", "speed"])?;
        let share = |what: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(what));
            let share = line.and_then(|line| line.split_ascii_whitespace().next());
            share.with_context(|| what.to_owned())?.parse::<f64>().context("no share")
        };
        Ok(Self { demotion: share("demotion:")?, promotion: share("promotion:")? })
    }
}

/// In words: there is no bar.
pub(crate) fn working_sets() -> anyhow::Result<()> {
    test("FARMEM_MEASURE_WORKING_SETS", &["--test", "it", "gains"]).map(drop)
}

/// Runs tests of the server that measure if a variable is set; returns what they printed.
fn test(variable: &str, which: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["test", "--release", "-p", "farmem-memserver"]).args(which);
    command.args(["--", "--nocapture"]).env(variable, "1");
    let output = command.stderr(Stdio::piped()).output().context("run cargo")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    eprint!("{text}");
    ensure!(output.status.success(), "tests of the server failed");
    Ok(text)
}
