//! `cargo xtask bench server`: the memory server beside memcached and Redis.
//!
//! All servers run at the same time on one processor and one of them at a time is asked, from
//! another processor, by the same program (`pageload`), round after round. Figures are medians, and
//! only ratios within one run mean anything.

mod backup;
mod bars;
mod capacity;
mod contestants;
mod figures;
mod restart;
mod serving;
mod tables;
mod tiers;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use crate::build::{self, Built};
use backup::Backup;
use capacity::Capacity;
use contestants::{Absence, Contestants, Server};
use figures::{Figures, Way};
use restart::Restart;
use tables::Tables;
use tiers::Tiers;

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Reads, beside memcached, Redis and a plain stream.
    Reads,
    /// Large empty regions, and first touches of pages.
    Regions,
    /// What tables take.
    Tables,
    /// Demotion and promotion, beside the bare compressor.
    Tiers,
    /// How much more than its memory a server serves.
    Capacity,
    /// How soon another process serves what a killed one held.
    Restart,
    /// Backups, beside plain files.
    Backup,
    /// What it gains that pages are brought near that were read first.
    WorkingSets,
}

#[derive(Args)]
pub(crate) struct ServerOptions {
    /// One short round: shows that all works, proves nothing.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Rounds of reads; the medians are over these.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// How long to ask each server in each way, in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Processors of the servers and of the one who asks.
    #[arg(long, default_values_t = [0, 1], num_args = 2, value_names = ["SERVERS", "CLIENT"])]
    processors: Vec<usize>,
    /// Write all figures there.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Pages of 4 KiB that each server holds: 256 MiB, more than processors keep in their caches.
const PAGES: u64 = 65_536;

#[expect(clippy::print_stdout, reason = "the table is the result")]
pub(crate) fn server(options: &ServerOptions) -> anyhow::Result<()> {
    let built = build::shipped(true)?;
    let quick = options.quick;
    let mut figures = Figures::default();
    let does = |part| options.only.is_empty() || options.only.contains(&part);
    let (does_reads, does_regions) = (does(Part::Reads), does(Part::Regions));
    if does_reads || does_regions {
        let contestants = contestants(options, &built)?;
        for (server, absence) in contestants.absent() {
            eprintln!("{server}: {absence}");
            figures.absent.insert(server, absence.clone());
        }
        if does_reads {
            reads(options, &contestants, &mut figures)?;
        }
        if does_regions {
            for _ in 0..rounds(options) {
                figures.add_regions(contestants.regions()?);
            }
        }
    }
    if does(Part::Tables) {
        figures.tables = Some(Tables::measure(&built, quick)?);
    }
    if does(Part::Tiers) {
        figures.tiers = Some(Tiers::measure()?);
    }
    if does(Part::Capacity) {
        figures.capacity = Some(Capacity::measure(&built, quick)?);
    }
    if does(Part::Restart) {
        figures.restart = Some(Restart::measure(&built, quick)?);
    }
    if does(Part::Backup) {
        figures.backup = Some(Backup::measure(&built, quick)?);
    }
    if does(Part::WorkingSets) {
        tiers::working_sets()?;
    }
    println!("{}", figures.table());
    let verdicts = bars::judge(&figures);
    // What was not to be measured is no verdict.
    let is_meant = |verdict: &&bars::Verdict| {
        options.only.is_empty() || verdict.met.is_some() || verdict.why_not_measured.is_some()
    };
    for verdict in verdicts.iter().filter(is_meant) {
        println!("{verdict}");
    }
    if let Some(file) = &options.json {
        let text = figures.json(&verdicts, quick)?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    let missed = verdicts.iter().filter(|verdict| verdict.met == Some(false)).count();
    let failed = verdicts.iter().filter(|verdict| verdict.comparator_failed).count();
    ensure!(
        missed + failed == 0,
        "of {} bars {missed} were missed, and {failed} not measured as what they compare with failed",
        verdicts.len()
    );
    Ok(())
}

fn rounds(options: &ServerOptions) -> usize {
    if options.quick { 1 } else { options.runs.max(1) }
}

fn contestants(options: &ServerOptions, built: &Built) -> anyhow::Result<Contestants> {
    build::cargo(&["build", "--release", "-p", "farmem-pageload"])?;
    Contestants::start(built, &options.processors)
}

fn reads(
    options: &ServerOptions,
    contestants: &Contestants,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let seconds = if options.quick { 0.2 } else { options.seconds };
    for round in 1..=rounds(options) {
        for server in Server::ALL {
            let found = match contestants.ask(server, &Way::ALL, PAGES, seconds) {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) if server == Server::Farmem => return Err(error),
                Err(error) => {
                    eprintln!("{round} {server:10} failed: {error:#}");
                    let failed = Absence::Failed(format!("{error:#}"));
                    figures.absent.insert(server, failed);
                    continue;
                }
            };
            for figure in found {
                let way = figure.way();
                let rate = figure.pages_per_second;
                eprintln!("{round} {server:10} {way:24} {rate:12.0} pages/s");
                figures.add(server, figure);
            }
        }
        figures.add_stream(contestants.stream(seconds)?);
    }
    Ok(())
}
