//! `cargo xtask verify`: real programs, each with the whole, a half, a quarter and a tenth of the
//! memory that it takes natively. What they print must be what they print natively, and a result
//! counts only if pages were evicted. What was found is kept in docs/programs.json ([`record`]), and so
//! are the runs of the [`oracle`].

mod oracle;
mod record;

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use crate::bench::cases::{Redis, evicted_pages};
use crate::build;
use crate::provenance::Provenance;
use crate::stage::{Program, Stage, Variant, digest};
use record::{Record, Row};

/// Shares of the native peak, in percent.
const SHARES: [u64; 4] = [100, 50, 25, 10];

/// What a program at a tenth of its memory may take: a merge sort of 1.5 GiB there reads a page anew
/// for every line and level, tens of millions of them.
const PATIENCE: Duration = Duration::from_secs(3600);

/// No program is given less: below it little but code and locked memory is left.
const LIMIT_MIN_BYTES: u64 = 16 << 20;

#[derive(Args)]
pub(crate) struct VerifyOptions {
    /// Smaller inputs.
    #[arg(long)]
    quick: bool,
    /// Only these programs.
    #[arg(long, value_enum, value_delimiter = ',')]
    programs: Vec<Name>,
    /// Only this share of the native peak, in percent.
    #[arg(long)]
    share: Option<u64>,
    /// How the programs are run. With the kernel's swap nothing is recorded: it tells how much of
    /// the time is the program's own, at this limit.
    #[arg(long, value_enum, default_value = "unix")]
    variant: Variant,
    /// Leave the page of results as it is.
    #[arg(long)]
    unrecorded: bool,
    /// Instead, run the stamping oracle with a tenth of its memory for so long. Calls add up.
    #[arg(long, value_name = "MINUTES", conflicts_with_all = ["quick", "programs", "share", "variant"])]
    oracle: Option<f64>,
    /// Only make the page of results anew from what was recorded.
    #[arg(long, exclusive = true)]
    page: bool,
    /// A folder on a disk for large files.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Sort,
    Dict,
    Sqlite,
    Gcc,
    Redis,
    Stamp,
    Counter,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().expect("no program is hidden").get_name())
    }
}

/// How a result is compared with the native one.
enum Trial {
    /// All that it prints.
    Output(Program),
    /// One field of the JSON that it prints; the others are times.
    Field(Program, &'static str),
    /// By itself, key by key.
    Redis(Redis),
}

/// What a run showed.
struct Shown {
    result: String,
    wall_seconds: f64,
    peak_anonymous_bytes: u64,
    evicted_pages: u64,
}

/// How many runs computed the same as natively.
pub(crate) struct Tally {
    pub(crate) same: usize,
    pub(crate) wrong: usize,
}

impl Tally {
    const fn count(&mut self, judged: &anyhow::Result<Shown>) {
        match judged {
            Ok(_) => self.same += 1,
            Err(_) => self.wrong += 1,
        }
    }
}

pub(crate) fn verify(options: &VerifyOptions) -> anyhow::Result<()> {
    if options.page {
        return Record::read(build::workspace())?.write(build::workspace());
    }
    if let Some(minutes) = options.oracle {
        ensure!(minutes > 0.0, "--oracle takes minutes");
        let _ = Provenance::now();
        let stage = Stage::prepare(build::with_workloads()?, &options.scratch, &[])?;
        return oracle::run(minutes, &stage, build::workspace());
    }
    ensure!(options.variant != Variant::Native, "--variant must be a way with a limit");
    let tally = compare(options)?;
    ensure!(tally.wrong == 0, "{} of {} runs failed", tally.wrong, tally.wrong + tally.same);
    Ok(())
}

/// Every program once, small and with a quarter of its memory.
pub(crate) fn for_ci() -> anyhow::Result<Tally> {
    compare(&VerifyOptions {
        quick: true,
        programs: Vec::new(),
        share: Some(25),
        variant: Variant::Unix,
        unrecorded: true,
        oracle: None,
        page: false,
        scratch: "/var/tmp".into(),
    })
}

#[expect(clippy::print_stdout, reason = "the table is the result")]
fn compare(options: &VerifyOptions) -> anyhow::Result<Tally> {
    let _ = Provenance::now();
    let built = build::with_workloads()?;
    let stage = Stage::prepare(built, &options.scratch, &[options.variant])?;
    let names = match options.programs.as_slice() {
        [] => Name::value_variants(),
        chosen => chosen,
    };
    println!(
        "program   share  limit MiB  result      evicted pages  seconds  native  MiB above limit"
    );
    let mut tally = Tally { same: 0, wrong: 0 };
    for name in names {
        let trial = prepare(*name, options.quick, &stage)?;
        let native = trial.show(&stage, Variant::Native, u64::MAX);
        let native = native.with_context(|| format!("{name}, native"))?;
        for share in SHARES.into_iter().filter(|share| options.share.is_none_or(|s| s == *share)) {
            let limit = (native.peak_anonymous_bytes * share / 100).max(LIMIT_MIN_BYTES);
            let judged = trial
                .show(&stage, options.variant, limit)
                .and_then(|shown| judge(&native, shown, options.variant, share));
            tally.count(&judged);
            tell(*name, share, limit, &native, &judged);
            if options.variant.is_farmem() && !(options.quick || options.unrecorded) {
                let mut record = Record::read(build::workspace())?;
                record.put(&name.to_string(), share, row(limit, &native, &judged));
                record.write(build::workspace())?;
            }
        }
    }
    Ok(tally)
}

#[expect(clippy::print_stdout, reason = "the table is the result")]
fn tell(name: Name, share: u64, limit: u64, native: &Shown, judged: &anyhow::Result<Shown>) {
    print!("{name:9} {share:4} %  {:9}  ", limit >> 20);
    match judged {
        Ok(shown) => println!(
            "same        {:13}  {:7.1}  {:6.1}  {:15.1}",
            shown.evicted_pages,
            shown.wall_seconds,
            native.wall_seconds,
            (shown.peak_anonymous_bytes as f64 - limit as f64) / 1048576.0,
        ),
        Err(error) => println!("FAILED      {error:#}"),
    }
}

fn row(limit_bytes: u64, native: &Shown, judged: &anyhow::Result<Shown>) -> Row {
    let shown = judged.as_ref().ok();
    Row {
        result: judged.as_ref().err().map_or("same".to_owned(), |error| format!("{error:#}")),
        limit_bytes,
        peak_bytes: shown.map_or(0, |shown| shown.peak_anonymous_bytes),
        evicted_pages: shown.map_or(0, |shown| shown.evicted_pages),
        seconds: shown.map_or(0.0, |shown| shown.wall_seconds),
        native_seconds: native.wall_seconds,
        of: Provenance::now(),
    }
}

fn judge(native: &Shown, shown: Shown, variant: Variant, share: u64) -> anyhow::Result<Shown> {
    ensure!(
        shown.result == native.result,
        "WRONG: {} natively, {} under farmem",
        native.result,
        shown.result
    );
    let counts = share == 100 || !variant.is_farmem() || shown.evicted_pages > 0;
    ensure!(counts, "nothing was evicted: proves nothing");
    Ok(shown)
}

impl Trial {
    fn show(&self, stage: &Stage, variant: Variant, limit_bytes: u64) -> anyhow::Result<Shown> {
        if let Self::Redis(redis) = self {
            let started = Instant::now();
            let runs = redis.measure(stage, variant, limit_bytes)?;
            let run = runs.first().context("redis was not measured")?;
            return Ok(Shown {
                result: "all keys right".to_owned(),
                wall_seconds: started.elapsed().as_secs_f64(),
                peak_anonymous_bytes: run.peak.anonymous_bytes,
                evicted_pages: evicted_pages(run.stats.as_ref()),
            });
        }
        let (Self::Output(program) | Self::Field(program, _)) = self else {
            unreachable!("redis was dealt with")
        };
        let outcome = stage.run(variant, limit_bytes, program)?;
        let result = match self {
            Self::Field(_, field) => {
                let report = outcome.report()?;
                report.get(field).with_context(|| format!("no {field} in {report}"))?.to_string()
            }
            Self::Output(_) | Self::Redis(_) => digest(&outcome.output)?,
        };
        Ok(Shown {
            result,
            wall_seconds: outcome.wall_seconds,
            peak_anonymous_bytes: outcome.peak.anonymous_bytes,
            evicted_pages: evicted_pages(outcome.stats.as_ref()),
        })
    }
}

fn prepare(name: Name, quick: bool, stage: &Stage) -> anyhow::Result<Trial> {
    let programs = build::workspace().join("crates/workloads/programs");
    let program = |watched, words: &[&str]| {
        let program = Program::new(watched, words.iter().map(|word| (*word).to_owned()));
        if quick { program } else { Program { patience: PATIENCE, ..program } }
    };
    let size = |small: u64, large: u64| if quick { small } else { large };
    Ok(match name {
        Name::Sort => {
            let (lines, mebibytes) = (stage.scratch("lines"), size(96, 1536));
            stage.generate(&lines, &["lines", &format!("--mebibytes={mebibytes}")])?;
            let buffer = format!("--buffer-size={}M", 2 * mebibytes);
            let sort = ["env", "LC_ALL=C", "sort", "--parallel=2", &buffer];
            Trial::Output(program("sort", &sort).reading(&lines))
        }
        Name::Dict => {
            let script = programs.join("dict.py").display().to_string();
            let entries = size(1_000_000, 4_000_000).to_string();
            let python = ["/usr/bin/python3", &script, &entries, "3", "200000"];
            Trial::Field(program("python3", &python), "check")
        }
        Name::Sqlite => {
            let sqlite = program("sqlite3", &["sqlite3", ":memory:"]);
            Trial::Output(sqlite.reading(&programs.join("table.sql")))
        }
        Name::Gcc => {
            let source = stage.scratch("large.c");
            stage.generate(&source, &["c", &format!("--functions={}", size(2000, 6000))])?;
            let gcc = ["gcc", "-O1", "-S", &source.display().to_string(), "-o", "-"];
            Trial::Output(program("cc1", &gcc))
        }
        Name::Redis => {
            let bytes = size(128, 512) << 20;
            Trial::Redis(Redis { keys: Redis::keys_of(bytes), requests: size(20_000, 200_000) })
        }
        Name::Stamp => {
            let rounds = size(300_000, 3_000_000).to_string();
            let stamp =
                [&stage.built("stamp"), "--mebibytes=256", "--with=all", "--rounds", &rounds];
            Trial::Field(program("stamp", &stamp), "digest")
        }
        Name::Counter => {
            let seconds = format!("--seconds={}", size(3, 20));
            let counter = [&stage.built("counter"), "--mebibytes=256", &seconds];
            Trial::Field(program("counter", &counter), "lost_increments")
        }
    })
}
