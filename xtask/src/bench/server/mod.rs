//! `cargo xtask bench server`: the memory server beside memcached and Redis.
//!
//! All servers run at the same time on one processor and one of them at a time is asked, from
//! another processor, by the same program (`pageload`), round after round. Figures are medians, and
//! only ratios within one run mean anything.

mod bars;
mod capacity;
mod contestants;
mod figures;
mod keeping;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;

use crate::build;
use capacity::Capacity;
use contestants::{Contestants, Server};
use figures::{Figures, Way};
use keeping::Keeping;

#[derive(Args)]
pub(crate) struct ServerOptions {
    /// One short round: shows that all works, proves nothing.
    #[arg(long)]
    quick: bool,
    /// Measure only what concerns the data that a server keeps: restart and backup.
    #[arg(long)]
    keeping: bool,
    /// Measure only how much more than its memory a server serves.
    #[arg(long)]
    capacity: bool,
    /// Rounds; the medians are over these.
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

pub(crate) fn server(options: &ServerOptions) -> anyhow::Result<()> {
    let built = build::shipped(true)?;
    if options.keeping {
        let mut figures = Figures::default();
        figures.set_keeping(Keeping::measure(&built, options.quick)?);
        return judge(&figures);
    }
    if options.capacity {
        let mut figures = Figures::default();
        figures.set_capacity(Capacity::measure(&built, options.quick)?);
        return judge(&figures);
    }
    build::cargo(&["build", "--release", "-p", "farmem-pageload"])?;
    let rounds = if options.quick { 1 } else { options.runs.max(1) };
    let seconds = if options.quick { 0.2 } else { options.seconds };
    let contestants = Contestants::start(&built, &options.processors)?;
    let mut figures = Figures::default();
    for round in 1..=rounds {
        for server in Server::ALL {
            let Some(found) = contestants.ask(server, &Way::ALL, PAGES, seconds)? else {
                continue;
            };
            for figure in found {
                let way = figure.way();
                let rate = figure.pages_per_second;
                eprintln!("{round} {server:10} {way:24} {rate:12.0} pages/s");
                figures.add(server, figure);
            }
        }
        figures.add_stream(contestants.stream(seconds)?);
        figures.add_regions(contestants.regions()?);
    }
    figures.set_keeping(Keeping::measure(&built, options.quick)?);
    figures.set_capacity(Capacity::measure(&built, options.quick)?);
    tiers()?;
    let verdicts = bars::judge(&figures);
    report(&figures, &contestants, &verdicts);
    if let Some(file) = &options.json {
        let text = figures.json(&verdicts, rounds, options.quick)?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    ensure_met(&verdicts)
}

fn ensure_met(verdicts: &[bars::Verdict]) -> anyhow::Result<()> {
    let missed = verdicts.iter().filter(|verdict| verdict.met == Some(false)).count();
    ensure!(missed == 0, "{missed} of {} bars were missed", verdicts.len());
    Ok(())
}

/// Only those bars of which something was measured.
#[expect(clippy::print_stdout, reason = "the verdicts are the result")]
fn judge(figures: &Figures) -> anyhow::Result<()> {
    println!("{}", figures.table());
    let verdicts = bars::judge(figures);
    for verdict in verdicts.iter().filter(|verdict| verdict.met.is_some()) {
        println!("{verdict}");
    }
    ensure_met(&verdicts)
}

/// How fast pages move between tiers: a test of the server measures and judges it, and says so.
fn tiers() -> anyhow::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["test", "--release", "-p", "farmem-memserver", "--lib", "speed"]);
    command.args(["--", "--nocapture"]).env("FARMEM_MEASURE_TIERS", "1");
    ensure!(command.status().context("run cargo")?.success(), "the tiers are too slow");
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the table is the result")]
fn report(figures: &Figures, contestants: &Contestants, verdicts: &[bars::Verdict]) {
    println!("{}", figures.table());
    for (server, reason) in contestants.absent() {
        println!("{server}: skipped: {reason}");
    }
    for verdict in verdicts {
        println!("{verdict}");
    }
}
