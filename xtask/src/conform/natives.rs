//! Native runs of a suite, kept beside its sources: a call that goes on where another ended need not
//! repeat them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::suites::{Cache, Suite};
use super::trial::{Case, Native};
use crate::stage::Stage;

/// The native runs that are known.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Natives {
    #[serde(skip)]
    file: PathBuf,
    /// Of which version of the suite.
    source: String,
    cases: BTreeMap<String, Native>,
}

impl Natives {
    /// `with_known`: those of earlier calls count, if they are of the same version.
    pub(crate) fn open(cache: &Cache, suite: &Suite, with_known: bool) -> anyhow::Result<Self> {
        let file = cache.natives(&suite.name.to_string());
        let known: Self = match fs::read(&file) {
            Ok(text) if with_known => serde_json::from_slice(&text)
                .with_context(|| format!("parse {}: remove it", file.display()))?,
            _ => Self::default(),
        };
        let cases = if known.source == suite.source { known.cases } else { BTreeMap::new() };
        Ok(Self { file, source: suite.source.clone(), cases })
    }

    /// How the case goes natively.
    pub(crate) fn of(&mut self, case: &Case, stage: &Stage) -> anyhow::Result<Native> {
        if let Some(native) = self.cases.get(&case.name).filter(|native| !native.late) {
            return Ok(native.clone());
        }
        let native = Native::of(case, stage)?;
        self.cases.insert(case.name.clone(), native.clone());
        let json = serde_json::to_vec(self).context("write JSON")?;
        fs::write(&self.file, json).with_context(|| format!("write {}", self.file.display()))?;
        Ok(native)
    }
}
