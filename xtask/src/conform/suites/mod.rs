//! The suites: where each comes from, its cases, and how their verdicts are read.

mod jemalloc;
mod memcached;
mod postgres;
mod programs;
mod python;
mod redis;
mod sources;
mod sqlite;
mod stress;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::ValueEnum;

use super::trial::{Case, Ended, Verdicts};
use crate::build::workspace;

/// A suite, in the order in which they are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// CPython's own tests.
    Python,
    /// SQLite's own tests.
    Sqlite,
    /// Redis's own tests.
    Redis,
    /// memcached's own tests.
    Memcached,
    /// PostgreSQL's regression tests.
    Postgres,
    /// jemalloc's own tests.
    Jemalloc,
    /// stress-ng's stressors of memory.
    Stress,
    /// gcc compiling C++.
    Gcc,
    /// A numpy and pandas job.
    Numpy,
    /// A Go program.
    Go,
    /// A Java program, with each collector.
    Java,
    /// A Node program.
    Node,
    /// A LuaJIT program.
    Luajit,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("no suite is hidden").get_name())
    }
}

impl Name {
    /// All of them: one that is missing here would be missing from the page too.
    pub(crate) fn all() -> &'static [Self] {
        Self::value_variants()
    }

    /// Those that need no sources and no large packages.
    pub(crate) const SHORT: &[Self] = &[Self::Python, Self::Stress];

    pub(crate) fn prepare(self, cache: &Cache, short: bool) -> anyhow::Result<Suite> {
        let (source, cases) = match self {
            Self::Python => python::prepare(cache, short),
            Self::Sqlite => sqlite::prepare(cache),
            Self::Redis => redis::prepare(cache),
            Self::Memcached => memcached::prepare(cache),
            Self::Postgres => postgres::prepare(cache),
            Self::Jemalloc => jemalloc::prepare(cache),
            Self::Gcc => programs::gcc(cache),
            Self::Stress => stress::prepare(cache, short),
            Self::Numpy => programs::numpy(cache),
            Self::Go => programs::go(cache),
            Self::Java => programs::java(cache),
            Self::Node => programs::node(cache),
            Self::Luajit => programs::luajit(cache),
        }
        .with_context(|| format!("prepare the suite {self}"))?;
        ensure!(!cases.is_empty(), "the suite {self} has no cases");
        Ok(Suite { name: self, source, cases })
    }
}

/// A suite that is ready to run.
#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) name: Name,
    /// What it is and of which version, in a line.
    pub(crate) source: String,
    pub(crate) cases: Vec<Case>,
}

/// What a suite's preparation says: its source and its cases.
type Prepared = (String, Vec<Case>);

/// Where sources are fetched to and built, outside of the tree.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub(crate) fn open(folder: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(Self { folder })
    }

    /// Where native runs of a suite are kept.
    pub(crate) fn natives(&self, suite: &str) -> PathBuf {
        self.folder.join(format!("native-{suite}.json"))
    }

    /// Installs Debian packages that are not there yet.
    fn packages(&self, names: &[&str]) -> anyhow::Result<()> {
        run(Command::new(workspace().join(".ci/packages")).args(names))
    }
}

/// The version of an installed Debian package.
fn version_of(package: &str) -> anyhow::Result<String> {
    said(Command::new("dpkg-query").args(["--show", "--showformat=${Version}", package]))
}

/// A script or source of this workspace.
fn own(name: &str) -> String {
    workspace().join("xtask/suites").join(name).display().to_string()
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdout(std::io::stderr()).status();
    let status = status.with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    String::from_utf8(output.stdout).with_context(|| format!("output of {command:?}"))
}

/// Reads a file of lines `name TAB verdict`. What is told twice and otherwise has both verdicts.
fn verdict_lines(file: &Path) -> anyhow::Result<Verdicts> {
    let text = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some((name, verdict)) = line.split_once('\t') {
            let before = verdicts.entry(name.to_owned()).or_default();
            if !before.split(", ").any(|known| known == verdict) {
                *before += if before.is_empty() { "" } else { ", " };
                *before += verdict;
            }
        }
    }
    Ok(verdicts)
}
