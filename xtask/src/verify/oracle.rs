//! `cargo xtask verify --oracle MINUTES`: the stamping oracle with a tenth of its memory, threads that
//! fork, move, drop, free, unmap and protect at random, for so many minutes, in runs of a few minutes
//! with a seed each. Every run is recorded: runs of several calls add up.

use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::LIMIT_MIN_BYTES;
use super::record::Record;
use crate::provenance::Provenance;
use crate::stage::{Outcome, Program, Stage, Variant};

/// Threads that stamp.
const THREADS: u64 = 8;

/// Memory of them all together.
const MEBIBYTES: u64 = 512;

/// The share of the native peak, in percent.
const SHARE: u64 = 10;

/// A run is not longer: what goes wrong late in a long one is hard to come by again.
const RUN_MINUTES_MAX: f64 = 3.0;

/// Beyond its time a run waits for its children and checks every page once.
const AFTER: Duration = Duration::from_secs(60);

/// One run with one seed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) seed: u64,
    /// "right", or what was wrong.
    pub(super) result: String,
    pub(super) seconds: f64,
    pub(super) operations: u64,
    pub(super) children_forked: u64,
    pub(super) faults: u64,
    pub(super) evicted_pages: u64,
    pub(super) fetched_pages: u64,
    pub(super) limit_bytes: u64,
    pub(super) of: Provenance,
}

impl Run {
    pub(super) fn is_right(&self) -> bool {
        self.result == "right"
    }
}

/// Runs for `minutes` and records what was found.
pub(super) fn run(minutes: f64, stage: &Stage, workspace: &Path) -> anyhow::Result<()> {
    let native = stage.run(Variant::Native, u64::MAX, &stamp(stage, 1, 5.0))?;
    let limit_bytes = (native.peak.anonymous_bytes * SHARE / 100).max(LIMIT_MIN_BYTES);
    let runs = (minutes / RUN_MINUTES_MAX).ceil().max(1.0);
    let seconds = minutes * 60.0 / runs;
    let mut wrong = 0;
    for _ in 0..runs as u64 {
        let mut record = Record::read(workspace)?;
        let seed = record.oracle.iter().map(|run| run.seed).max().unwrap_or(0) + 1;
        let program = stamp(stage, seed, seconds);
        let outcome = stage.start(Variant::Unix, limit_bytes, &program)?.describe_end()?;
        let run = read(seed, limit_bytes, &outcome);
        tell(&run);
        wrong += u64::from(!run.is_right());
        // Another call may have recorded a run meanwhile.
        record = Record::read(workspace)?;
        record.oracle.push(run);
        record.write(workspace)?;
    }
    ensure!(wrong == 0, "{wrong} runs were not right");
    Ok(())
}

fn stamp(stage: &Stage, seed: u64, seconds: f64) -> Program {
    let command = [
        stage.built("stamp"),
        format!("--mebibytes={MEBIBYTES}"),
        format!("--threads={THREADS}"),
        "--with=all".to_owned(),
        format!("--seed={seed}"),
        format!("--seconds={seconds}"),
    ];
    let mut program = Program::new("stamp", command);
    program.patience = Duration::from_secs_f64(seconds) + AFTER;
    program
}

fn read(seed: u64, limit_bytes: u64, (outcome, complaint): &(Outcome, Option<String>)) -> Run {
    let report = outcome.report().unwrap_or_default();
    let told = |name: &str| report[name].as_u64().unwrap_or(0);
    let counted =
        |name: &str| outcome.stats.as_ref().and_then(|stats| stats[name].as_u64()).unwrap_or(0);
    let result = match complaint {
        Some(complaint) => complaint.clone(),
        None if counted("evicted_pages") == 0 => "nothing was evicted: proves nothing".to_owned(),
        None => "right".to_owned(),
    };
    Run {
        seed,
        result,
        seconds: outcome.wall_seconds,
        operations: told("operations"),
        children_forked: told("children_forked"),
        faults: counted("faults"),
        evicted_pages: counted("evicted_pages"),
        fetched_pages: counted("fetched_pages"),
        limit_bytes,
        of: Provenance::now(),
    }
}

fn tell(run: &Run) {
    eprintln!(
        "oracle, seed {}: {}; {:.0} s, {} operations, {} children, {} faults, {} pages evicted, {} \
         fetched",
        run.seed,
        run.result,
        run.seconds,
        run.operations,
        run.children_forked,
        run.faults,
        run.evicted_pages,
        run.fetched_pages,
    );
}

/// For the page: all runs in sum, and each.
pub(super) fn page(runs: &[Run]) -> String {
    let sum = |of: fn(&Run) -> u64| runs.iter().map(of).sum::<u64>();
    let minutes_of = |runs: &[Run]| runs.iter().map(|run| run.seconds).sum::<f64>() / 60.0;
    let minutes = minutes_of(runs);
    let since = runs.iter().rposition(|run| !run.is_right()).map_or(0, |last| last + 1);
    let (right, right_minutes) = (runs.len() - since, minutes_of(&runs[since..]));
    let wrong = runs.iter().filter(|run| !run.is_right()).count();
    let mut page = format!(
        "\n## Oracle\n\n`cargo xtask verify --oracle MINUTES`: {THREADS} threads stamp {MEBIBYTES} MiB and \
         check every word that\nthey load, and at random fork children that check the snapshot, move, \
         unmap and map anew, give\nback, free, protect, start threads, and let system calls touch the \
         pages, under a timer that\ninterrupts a thousand times a second; the limit is {SHARE} % of the \
         native peak. Each run has a seed of\nits own, and ends with the first wrong byte.\n\n\
         **{} runs, {minutes:.0} minutes: {} with a wrong byte or another failure.** {} operations, {} \
         children\nforked, {} faults, {} pages evicted, {} fetched.\n\
         The last {right} runs, {right_minutes:.0} minutes, were right.\n\n\
         | seed | result | seconds | operations | children | faults | pages evicted | fetched | limit MiB | measured |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        runs.len(),
        if wrong == 0 { "none".to_owned() } else { wrong.to_string() },
        sum(|run| run.operations),
        sum(|run| run.children_forked),
        sum(|run| run.faults),
        sum(|run| run.evicted_pages),
        sum(|run| run.fetched_pages),
    );
    for run in runs {
        page += &format!(
            "| {} | {} | {:.0} | {} | {} | {} | {} | {} | {} | {} |\n",
            run.seed,
            run.result,
            run.seconds,
            run.operations,
            run.children_forked,
            run.faults,
            run.evicted_pages,
            run.fetched_pages,
            run.limit_bytes >> 20,
            run.of,
        );
    }
    page
}
