//! `cargo xtask conform`: real test suites, natively and with a share of the memory that they take
//! natively. Every test must end under farmem as it does without.
//!
//! * [`suites`]: which suites there are, where they come from, and how their verdicts are read.
//! * [`trial`]: runs one case of a suite and compares it with its native run.
//! * [`natives`]: native runs that a later call need not repeat.
//! * [`record`]: what was found, in docs/conformance.json, and the page made from it.

mod natives;
mod record;
mod suites;
mod trial;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Args;

use crate::build::{self, workspace};
use crate::provenance::Provenance;
use crate::stage::Stage;
use natives::Natives;
use record::{Record, Row};
use suites::{Cache, Name, Suite};
use trial::Comparison;

/// Shares of the native peak, in percent; first those that ask most.
const SHARES: [u64; 4] = [25, 10, 50, 100];

#[derive(Args)]
pub(crate) struct ConformOptions {
    /// Only these suites.
    #[arg(value_enum)]
    suites: Vec<Name>,
    /// Only these shares of the native peak, in percent.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',')]
    local: Vec<u64>,
    /// A small part of the suites that need no sources, with half of the memory.
    #[arg(long)]
    short: bool,
    /// Only the cases whose names contain this; the page of results is left as it is.
    #[arg(long, value_name = "TEXT")]
    cases: Option<String>,
    /// Go on where an earlier run ended: what it has recorded of this version of a suite is not run
    /// again.
    #[arg(long)]
    resume: bool,
    /// Begin no run after so many minutes: with --resume another call goes on.
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// No run of a case may take longer. One that this cuts short natively has no results, one that it cuts
    /// short under farmem alone has timed out: --resume with more patience runs both again.
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u64>,
    /// Only make the page of results anew from what was recorded.
    #[arg(long, exclusive = true)]
    page: bool,
    /// A folder on a disk, for what the suites write.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

/// How many results were the same as natively while pages went out, and how many were not. A case that
/// was not paged is one more that was not, whatever its results are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) same: usize,
    pub(crate) wrong: usize,
}

impl Tally {
    fn add(&mut self, found: &Comparison) {
        self.same += if found.counts() { found.same } else { 0 };
        self.wrong += found.wrong() + usize::from(found.is_unpaged());
    }
}

pub(crate) fn conform(options: &ConformOptions) -> anyhow::Result<()> {
    if options.page {
        return Record::read(workspace())?.write(workspace());
    }
    let tally = run(options)?;
    ensure!(
        tally.wrong == 0,
        "{} of {} results are not those of the native run, or of a case of which nothing was paged out",
        tally.wrong,
        tally.wrong + tally.same
    );
    Ok(())
}

/// The short form, for every change.
pub(crate) fn for_ci() -> anyhow::Result<Tally> {
    run(&ConformOptions {
        suites: Vec::new(),
        local: Vec::new(),
        short: true,
        cases: None,
        resume: false,
        minutes: None,
        patience: None,
        page: false,
        scratch: "/var/tmp".into(),
    })
}

fn run(options: &ConformOptions) -> anyhow::Result<Tally> {
    let stage = Stage::prepare(build::with_workloads()?, &options.scratch, &[])?;
    let cache = Cache::open(build::target_folder().join("conform"))?;
    let names = match (options.suites.as_slice(), options.short) {
        ([], true) => Name::SHORT,
        ([], false) => Name::all(),
        (chosen, _) => chosen,
    };
    let shares = match (options.local.as_slice(), options.short) {
        ([], true) => &[50],
        ([], false) => &SHARES[..],
        (chosen, _) => chosen,
    };
    let _ = Provenance::now();
    let keep = match options {
        _ if options.short || options.cases.is_some() => Keep::Nothing,
        ConformOptions { resume: true, .. } => Keep::WithKnown,
        _ => Keep::Anew,
    };
    let until =
        options.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(60.0 * minutes));
    let mut run =
        Run { stage, keep, until, patience: options.patience, tally: Tally::default(), left: 0 };
    for name in names {
        let mut suite = name.prepare(&cache, options.short)?;
        if let Some(text) = &options.cases {
            suite.cases.retain(|case| case.name.contains(text));
        }
        if let Some(seconds) = options.patience {
            suite.cases.iter_mut().for_each(|case| case.hasten(Duration::from_secs(seconds)));
        }
        let natives = Natives::open(&cache, &suite, keep == Keep::WithKnown)?;
        run.try_suite(&suite, shares, natives)?;
    }
    eprintln!("\n{} runs left for another call", run.left);
    Ok(run.tally)
}

/// What becomes of the results.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// They are only told.
    Nothing,
    /// They replace those of earlier runs.
    Anew,
    /// They join those of earlier runs.
    WithKnown,
}

/// One call.
struct Run {
    stage: Stage,
    keep: Keep,
    /// No run of a case begins later.
    until: Option<Instant>,
    /// What `--patience` says, in seconds.
    patience: Option<u64>,
    tally: Tally,
    /// Runs that were not begun, as the time was over.
    left: usize,
}

impl Run {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Runs each case natively, then with each share. What was found so far is recorded after each
    /// case.
    fn try_suite(
        &mut self,
        suite: &Suite,
        shares: &[u64],
        mut natives: Natives,
    ) -> anyhow::Result<()> {
        eprintln!("\n== {}: {}", suite.name, suite.source);
        let with_known = self.keep == Keep::WithKnown;
        let known = if with_known { Record::read(workspace())? } else { Record::default() };
        let row = |share| known.row(suite, share).cloned();
        let row = |&share| (share, row(share).unwrap_or_else(|| Row::new(suite.cases.len())));
        let mut rows: Vec<(u64, Row)> = shares.iter().map(row).collect();
        for case in &suite.cases {
            let mut wanted: Vec<&mut (u64, Row)> =
                rows.iter_mut().filter(|(_, row)| !row.has(&case.name, self.patience)).collect();
            if wanted.is_empty() || self.is_over() {
                self.left += wanted.len();
                continue;
            }
            let native = natives.of(case, &self.stage)?;
            let mut done: Vec<Comparison> = Vec::new();
            for (share, row) in &mut wanted {
                if self.is_over() {
                    self.left += 1;
                    continue;
                }
                let limit_bytes = native.limit_bytes(*share);
                // A small program gets the least limit with more than one share.
                let known = done.iter().find(|comparison| comparison.limit_bytes == limit_bytes);
                // What has no time to end natively has none under farmem.
                if let (true, Some(seconds)) = (native.late, self.patience) {
                    row.cut_short(&case.name, seconds);
                    self.keep_row(suite, *share, row)?;
                    continue;
                }
                let comparison = match known {
                    Some(known) => known.clone(),
                    None => Comparison::of(case, &native, limit_bytes, &self.stage)?,
                };
                comparison.tell(*share);
                row.add(&comparison, self.patience);
                done.push(comparison.clone());
                self.tally.add(&comparison);
                self.keep_row(suite, *share, row)?;
            }
        }
        Ok(())
    }

    fn keep_row(&self, suite: &Suite, share: u64, row: &Row) -> anyhow::Result<()> {
        if self.keep != Keep::Nothing {
            let mut record = Record::read(workspace())?;
            record.put(suite, share, row.clone());
            record.write(workspace())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(evicted_pages: u64, together_bytes: u64, late: bool) -> Comparison {
        Comparison {
            case: "case".to_owned(),
            limit_bytes: 16 << 20,
            same: 3,
            differences: Vec::new(),
            timed_out: Vec::new(),
            unsteady: Vec::new(),
            evicted_pages,
            fetched_pages: 0,
            together_bytes,
            seconds: 1.0,
            native_seconds: 1.0,
            late,
            native_late: false,
        }
    }

    #[test]
    fn results_count_if_pages_went_out_and_must_where_they_do_not_fit() {
        for (found, same, wrong) in [
            (found(1, 32 << 20, false), 3, 0),
            (found(0, 32 << 20, false), 0, 1),
            // With all of its memory, or the least that there is, nothing has to go.
            (found(0, 16 << 20, false), 0, 0),
            (found(0, 1 << 20, false), 0, 0),
            // What was killed has told nothing.
            (found(0, 32 << 20, true), 0, 0),
        ] {
            let mut tally = Tally::default();
            tally.add(&found);
            assert_eq!(tally, Tally { same, wrong }, "{} pages", found.evicted_pages);
        }
    }
}
