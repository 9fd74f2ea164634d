//! `cargo xtask bench`. `paging`: what farmem costs and gains, side by side with the kernel's swap.
//! `server`: the memory server beside others. `fork`: what forking costs. `make`: what farmem costs
//! many short programs that fit.
//!
//! Every case runs in every way in turn, round after round, so that a slow minute of the machine
//! hits all alike; figures are medians, and only ratios within one run mean anything.

mod bars;
pub(crate) mod cases;
mod figures;
mod fork;
mod make;
mod plot;
mod server;
mod stream;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};

use crate::build;
use crate::stage::{Stage, Variant};
use bars::Verdict;
use cases::{Case, Scale};
use figures::Figures;

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Programs that need more memory than they may keep.
    Paging(PagingOptions),
    /// What forking costs, and a save of a redis-server that is mostly out.
    Fork(fork::ForkOptions),
    /// What farmem costs many short programs that fit.
    Make(make::MakeOptions),
    /// The memory server beside memcached and Redis.
    Server(server::ServerOptions),
}

#[derive(Args)]
pub(crate) struct PagingOptions {
    /// Shorter programs, one round: shows that all works, proves nothing.
    #[arg(long)]
    quick: bool,
    /// Rounds; the medians are over these.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only these cases.
    #[arg(long, value_enum, value_delimiter = ',')]
    cases: Vec<Case>,
    /// Only these ways of running them; native is always measured.
    #[arg(long, value_enum, value_delimiter = ',')]
    variants: Vec<Variant>,
    /// Write all figures there.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw them there.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// A folder on a disk for the swap file and other large files.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

pub(crate) fn bench(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Paging(options) => paging(options),
        BenchCommand::Fork(options) => fork::fork(options),
        BenchCommand::Make(options) => make::make(options),
        BenchCommand::Server(options) => server::server(options),
    }
}

fn paging(options: &PagingOptions) -> anyhow::Result<()> {
    let variants: Vec<Variant> = Variant::ALL
        .into_iter()
        .filter(|variant| {
            options.variants.is_empty()
                || *variant == Variant::Native
                || options.variants.contains(variant)
        })
        .collect();
    let cases = if options.cases.is_empty() { Case::ALL.to_vec() } else { options.cases.clone() };
    let farmem = variants.iter().any(|variant| variant.is_farmem());
    let built = if farmem { build::with_workloads()? } else { build::workloads()? };
    let stage = Stage::prepare(built, &options.scratch, &variants)?;
    let scale = if options.quick { Scale::QUICK } else { Scale::FULL };
    let rounds = if options.quick { 1 } else { options.runs.max(1) };

    let mut figures = Figures::default();
    for variant in &variants {
        if let Some(reason) = stage.obstacle(*variant) {
            eprintln!("{variant}: skipped: {reason}");
            figures.skip(*variant, reason);
        }
    }
    for case in cases {
        measure_case(&stage, &scale, case, &variants, rounds, &mut figures)
            .with_context(|| format!("case {}", case.name()))?;
    }
    let verdicts = bars::judge(&figures);
    report(&figures, &verdicts);
    if let Some(file) = &options.json {
        let text = figures.json(&verdicts, rounds, options.quick)?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        fs::write(file, plot::draw(&figures))
            .with_context(|| format!("write {}", file.display()))?;
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

fn measure_case(
    stage: &Stage,
    scale: &Scale,
    case: Case,
    variants: &[Variant],
    rounds: usize,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let prepared = case.prepare(stage, scale)?;
    for round in 1..=rounds.min(case.rounds_max()) {
        for variant in variants {
            if stage.obstacle(*variant).is_some() || !case.runs_in(*variant) {
                continue;
            }
            if case == Case::Sequential && variant.is_farmem() {
                figures.add_stream(stream::gigabytes_per_second().context("TCP stream")?);
            }
            if matches!(case, Case::Random | Case::Random2) && *variant == Variant::Tcp {
                let time = stream::round_trip_microseconds().context("TCP round trip")?;
                figures.add_round_trip(time);
            }
            if case == Case::Random && variant.is_farmem() {
                figures.add_bare_fault(stream::bare_fault_microseconds().context("bare fault")?);
            }
            match prepared.measure(stage, *variant) {
                Ok(runs) => {
                    for run in &runs {
                        let Some(value) = run.value else { continue };
                        let unit = run.what.unit();
                        eprintln!(
                            "{round} {:14} {variant:12} {value:10.3} {unit}",
                            run.what.name()
                        );
                    }
                    figures.add(*variant, runs);
                }
                Err(error) if error.to_string().contains("interrupted") => return Err(error),
                Err(error) => {
                    eprintln!("{round} {:14} {variant:12} failed: {error:#}", case.name());
                    figures.fail(case, *variant, &format!("{error:#}"));
                }
            }
        }
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the table is the result")]
fn report(figures: &Figures, verdicts: &[Verdict]) {
    println!("{}", figures.table());
    println!("{}", figures.latencies());
    for verdict in verdicts {
        println!("{verdict}");
    }
}
