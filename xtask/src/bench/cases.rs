//! The cases: which program, how much of its memory it may keep, and which figure of it counts.

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde::Serialize;

use crate::build;
use crate::stage::{Outcome, Peak, Program, Running, Stage, Variant, digest};

/// A program and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Case {
    /// An array that fits in the limit.
    Fits,
    /// An array of four times the limit, read at random by one thread.
    Random,
    /// The same by two threads.
    Random2,
    /// The same read in order.
    Sequential,
    /// The same written in order.
    Write,
    /// The same read one word every five pages.
    Stride5,
    /// redis-server holding four times the limit.
    Redis,
    /// A python3 dict at a quarter of its native peak.
    Pydict,
    /// GNU sort at a quarter of its native peak.
    Sort,
}

/// A figure that a case yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    Fits,
    Random,
    Random2,
    Sequential,
    Write,
    Stride5,
    RedisGet,
    RedisSet,
    PydictScan,
    Sort,
}

impl What {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fits => "fits",
            Self::Random => "random",
            Self::Random2 => "random, 2 thr.",
            Self::Sequential => "sequential",
            Self::Write => "write",
            Self::Stride5 => "stride 5",
            Self::RedisGet => "redis GET",
            Self::RedisSet => "redis SET",
            Self::PydictScan => "pydict scan",
            Self::Sort => "sort",
        }
    }

    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Fits | Self::PydictScan | Self::Sort => "s",
            Self::Random | Self::Random2 | Self::Stride5 => "us/access",
            Self::Sequential | Self::Write => "GB/s",
            Self::RedisGet | Self::RedisSet => "requests/s",
        }
    }

    /// Whether more is better.
    pub(crate) const fn is_throughput(self) -> bool {
        matches!(self, Self::Sequential | Self::Write | Self::RedisGet | Self::RedisSet)
    }
}

/// How large the programs are.
pub(crate) struct Scale {
    fits_passes: u32,
    array_mebibytes: u64,
    random_seconds: f64,
    redis_limit_mebibytes: u64,
    redis_requests: u64,
    dict_entries: u64,
    sort_mebibytes: u64,
}

impl Scale {
    pub(crate) const FULL: Self = Self {
        fits_passes: 200,
        array_mebibytes: 1024,
        random_seconds: 4.0,
        redis_limit_mebibytes: 128,
        redis_requests: 300_000,
        dict_entries: 6_000_000,
        sort_mebibytes: 1536,
    };
    pub(crate) const QUICK: Self = Self {
        fits_passes: 40,
        array_mebibytes: 256,
        random_seconds: 1.0,
        redis_limit_mebibytes: 32,
        redis_requests: 50_000,
        dict_entries: 1_000_000,
        sort_mebibytes: 128,
    };
}

/// One measured figure.
pub(crate) struct Run {
    pub(crate) what: What,
    /// In the unit of the figure; none if only its memory was looked at.
    pub(crate) value: Option<f64>,
    /// Processor time of program, pager and server for one access, request or whole run.
    pub(crate) cpu_us_per_unit: Option<f64>,
    pub(crate) limit_bytes: u64,
    pub(crate) peak: Peak,
    pub(crate) stats: Option<serde_json::Value>,
}

impl Case {
    pub(crate) const ALL: [Self; 9] = [
        Self::Fits,
        Self::Random,
        Self::Random2,
        Self::Sequential,
        Self::Write,
        Self::Stride5,
        Self::Redis,
        Self::Pydict,
        Self::Sort,
    ];

    /// The figures of a run.
    pub(crate) const fn figures(self) -> &'static [What] {
        match self {
            Self::Fits => &[What::Fits],
            Self::Random => &[What::Random],
            Self::Random2 => &[What::Random2],
            Self::Sequential => &[What::Sequential],
            Self::Write => &[What::Write],
            Self::Stride5 => &[What::Stride5],
            Self::Redis => &[What::RedisGet, What::RedisSet],
            Self::Pydict => &[What::PydictScan],
            Self::Sort => &[What::Sort],
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Pydict => "pydict",
            case => case.figures()[0].name(),
        }
    }

    /// Whether it is of interest in this way: a program that fits needs no swap.
    pub(crate) fn runs_in(self, variant: Variant) -> bool {
        self != Self::Fits || !matches!(variant, Variant::Zram | Variant::SwapFile)
    }

    /// Rounds at most: sorting takes minutes and its bar is that it ends.
    pub(crate) const fn rounds_max(self) -> usize {
        match self {
            Self::Sort => 1,
            _ => usize::MAX,
        }
    }

    /// Makes the input and finds the limit.
    pub(crate) fn prepare(self, stage: &Stage, scale: &Scale) -> anyhow::Result<Prepared> {
        let array = scale.array_mebibytes;
        let passes = |passes: u32| vec!["--passes".to_owned(), passes.to_string()];
        let random = |threads: u32| {
            let seconds = scale.random_seconds;
            vec![format!("--seconds={seconds}"), format!("--threads={threads}")]
        };
        let (mebibytes, limit, pattern, options) = match self {
            // The limit is twice the array: nothing is to happen below three quarters of it.
            Self::Fits => (array / 2, array << 20, "sequential", passes(scale.fits_passes)),
            Self::Random => (array, array << 18, "random", random(1)),
            Self::Random2 => (array, array << 18, "random", random(2)),
            Self::Sequential => (array, array << 18, "sequential", passes(2)),
            Self::Write => (array, array << 18, "write", passes(2)),
            Self::Stride5 => (array, array << 18, "stride", passes(1)),
            Self::Redis => return prepare_redis(scale),
            Self::Pydict => return prepare_dict(stage, scale),
            Self::Sort => return prepare_sort(stage, scale),
        };
        let size = format!("--mebibytes={mebibytes}");
        let command = [&stage.built("array"), &size, "--group-cpu-file={cpu_file}", pattern];
        let command = command.map(str::to_owned).into_iter().chain(options);
        let program = Program::new("array", command);
        let reading = if self == Self::Fits { Reading::Wall } else { Reading::Array };
        let kind = Kind::Program { program, reading };
        Ok(Prepared { case: self, limit_bytes: limit, kind })
    }
}

/// A case that is ready to run.
pub(crate) struct Prepared {
    case: Case,
    limit_bytes: u64,
    kind: Kind,
}

enum Kind {
    Program { program: Program, reading: Reading },
    Redis(Redis),
}

/// Where the figure of a program is found.
enum Reading {
    /// How long it took.
    Wall,
    /// The same, if its output is the native one.
    WallIfSorted { expected: String },
    /// In what the array program printed.
    Array,
    /// In what the dict script printed.
    Scan,
}

impl Prepared {
    /// Runs it once.
    pub(crate) fn measure(&self, stage: &Stage, variant: Variant) -> anyhow::Result<Vec<Run>> {
        let runs = match &self.kind {
            Kind::Redis(redis) => redis.measure(stage, variant, self.limit_bytes)?,
            Kind::Program { program, reading } => {
                let outcome = stage.run(variant, self.limit_bytes, program)?;
                vec![self.run_of(reading, outcome)?]
            }
        };
        // A figure of a run in which nothing was paged out says nothing about paging.
        if variant.is_farmem() && self.case != Case::Fits {
            for run in &runs {
                ensure!(evicted_pages(run.stats.as_ref()) > 0, "nothing was evicted");
            }
        }
        Ok(runs)
    }

    fn run_of(&self, reading: &Reading, mut outcome: Outcome) -> anyhow::Result<Run> {
        if matches!(reading, Reading::Array) {
            add_seen(&mut outcome)?;
        }
        let what = self.case.figures()[0];
        let (value, cpu_us) = match reading {
            Reading::Wall => (outcome.wall_seconds, outcome.cpu_seconds * 1e6),
            Reading::Array => array_figure(what, &outcome)?,
            Reading::Scan => {
                let report = outcome.report()?;
                let scan = report["scan_seconds"].as_f64().context("no scan_seconds")?;
                (scan, outcome.cpu_seconds * 1e6)
            }
            Reading::WallIfSorted { expected } => {
                ensure!(digest(&outcome.output)? == *expected, "WRONG BYTE in the sorted lines");
                (outcome.wall_seconds, outcome.cpu_seconds * 1e6)
            }
        };
        Ok(Run {
            what,
            value: Some(value),
            cpu_us_per_unit: Some(cpu_us),
            limit_bytes: self.limit_bytes,
            peak: outcome.peak,
            stats: outcome.stats,
        })
    }
}

/// Puts the fault times that the program itself has seen beside those of its pager.
fn add_seen(outcome: &mut Outcome) -> anyhow::Result<()> {
    let report = outcome.report()?;
    if let Some(serde_json::Value::Object(stats)) = &mut outcome.stats {
        for name in ["seen_p50_us", "seen_p99_us", "seen_p999_us"] {
            if let Some(time) = report.get(name).filter(|time| time.is_number()) {
                stats.insert(name.to_owned(), time.clone());
            }
        }
    }
    Ok(())
}

/// How many pages were paged out, by what `farmem run --stats` wrote.
pub(crate) fn evicted_pages(stats: Option<&serde_json::Value>) -> u64 {
    stats.and_then(|stats| stats["evicted_pages"].as_u64()).unwrap_or(0)
}

/// What the array program printed: the figure, and processor time in us for one access.
fn array_figure(what: What, outcome: &Outcome) -> anyhow::Result<(f64, f64)> {
    let report = outcome.report()?;
    let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name}"));
    let cpu_us = number("group_cpu_seconds")? * 1e6 / number("accesses")?;
    let value = if what.is_throughput() {
        number("gigabytes_per_second")?
    } else {
        number("ns_per_access")? / 1e3
    };
    Ok((value, cpu_us))
}

/// Runs natively and says how much a quarter of its anonymous memory is, at least 16 MiB.
fn quarter_of_native(stage: &Stage, program: &Program) -> anyhow::Result<(u64, Outcome)> {
    let outcome = stage.run(Variant::Native, u64::MAX, program).context("native run")?;
    Ok(((outcome.peak.anonymous_bytes / 4).max(16 << 20), outcome))
}

fn prepare_dict(stage: &Stage, scale: &Scale) -> anyhow::Result<Prepared> {
    let script = build::workspace().join("crates/workloads/programs/dict.py");
    let entries = scale.dict_entries.to_string();
    let command = ["/usr/bin/python3", &script.display().to_string(), &entries, "3", "0"];
    let program = Program::new("python3", command.map(str::to_owned));
    let (limit_bytes, _) = quarter_of_native(stage, &program)?;
    let kind = Kind::Program { program, reading: Reading::Scan };
    Ok(Prepared { case: Case::Pydict, limit_bytes, kind })
}

fn prepare_sort(stage: &Stage, scale: &Scale) -> anyhow::Result<Prepared> {
    let input = stage.scratch("lines");
    stage.generate(&input, &["lines", &format!("--mebibytes={}", scale.sort_mebibytes)])?;
    let buffer = format!("--buffer-size={}M", scale.sort_mebibytes * 2);
    let command = ["env", "LC_ALL=C", "sort", "--parallel=2", &buffer].map(str::to_owned);
    let mut program = Program::new("sort", command).reading(&input);
    program.patience = Duration::from_secs(1200);
    let (limit_bytes, native) = quarter_of_native(stage, &program)?;
    let expected = digest(&native.output)?;
    let kind = Kind::Program { program, reading: Reading::WallIfSorted { expected } };
    Ok(Prepared { case: Case::Sort, limit_bytes, kind })
}

fn prepare_redis(scale: &Scale) -> anyhow::Result<Prepared> {
    let limit_bytes = scale.redis_limit_mebibytes << 20;
    let redis = Redis { keys: Redis::keys_of(4 * limit_bytes), requests: scale.redis_requests };
    Ok(Prepared { case: Case::Redis, limit_bytes, kind: Kind::Redis(redis) })
}

/// A redis-server and what is done to it.
pub(crate) struct Redis {
    pub(crate) keys: u64,
    pub(crate) requests: u64,
}

impl Redis {
    const VALUE_BYTES: u64 = 1024;

    /// As many keys as make a redis-server hold `bytes`: of values, keys, and what it keeps
    /// for both.
    pub(crate) const fn keys_of(bytes: u64) -> u64 {
        bytes / (Self::VALUE_BYTES + 160)
    }

    /// Fills it, lets redis-benchmark get and set, and verifies every key.
    pub(crate) fn measure(
        &self,
        stage: &Stage,
        variant: Variant,
        limit_bytes: u64,
    ) -> anyhow::Result<Vec<Run>> {
        let port = Self::free_port()?;
        let command = ["redis-server", "--save", "", "--appendonly", "no", "--port", &port];
        let program = Program::new("redis-server", command.map(str::to_owned));
        let mut running = stage.start(variant, limit_bytes, &program)?;
        self.await_answer(&mut running, &port)?;
        self.content(stage, &port, &["fill"])?;
        self.content(stage, &port, &["verify"])?;
        // One pass that does not count brings what is resident into its steady state.
        self.benchmark("get", &port)?;
        let mut rates = Vec::new();
        for (what, test) in [(What::RedisGet, "get"), (What::RedisSet, "set")] {
            let before = running.cpu_seconds()?;
            let requests_per_second = self.benchmark(test, &port)?;
            let cpu_seconds = running.cpu_seconds()? - before;
            rates.push((what, requests_per_second, cpu_seconds * 1e6 / self.requests as f64));
        }
        self.content(stage, &port, &["--overwritten", "verify"])?;
        let shutdown = ["-p", &port, "shutdown", "nosave"];
        Command::new("redis-cli").args(shutdown).output().context("run redis-cli")?;
        let outcome = running.finish()?;
        let run = |(what, rate, cpu_us)| Run {
            what,
            value: Some(rate),
            cpu_us_per_unit: Some(cpu_us),
            limit_bytes,
            peak: outcome.peak,
            stats: outcome.stats.clone(),
        };
        Ok(rates.into_iter().map(run).collect())
    }

    /// A port at which nobody listens.
    pub(super) fn free_port() -> anyhow::Result<String> {
        Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string())
    }

    pub(super) fn await_answer(&self, running: &mut Running<'_>, port: &str) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(20);
        let started = Instant::now();
        loop {
            let ping = Command::new("redis-cli").args(["-p", port, "ping"]).output();
            if ping.context("run redis-cli (package redis-tools)")?.stdout.starts_with(b"PONG") {
                return Ok(());
            }
            running.ensure_running()?;
            ensure!(started.elapsed() < PATIENCE, "redis-server does not answer");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn content(
        &self,
        stage: &Stage,
        port: &str,
        arguments: &[&str],
    ) -> anyhow::Result<()> {
        let (keys, bytes) = (self.keys.to_string(), Self::VALUE_BYTES.to_string());
        let output = Command::new(stage.built("redis_content"))
            .args(["--address", &format!("127.0.0.1:{port}")])
            .args(["--keys", &keys, "--value-bytes", &bytes])
            .args(arguments)
            .output()
            .context("run redis_content")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}", said.trim());
        Ok(())
    }

    /// Requests a second of one test over all keys, uniformly.
    fn benchmark(&self, test: &str, port: &str) -> anyhow::Result<f64> {
        let output = Command::new("redis-benchmark")
            .args(["-p", port, "-t", test, "-c", "16", "--csv"])
            .args(["-n", &self.requests.to_string(), "-r", &self.keys.to_string()])
            .args(["-d", &Self::VALUE_BYTES.to_string()])
            .stdin(Stdio::null())
            .output()
            .context("run redis-benchmark (package redis-tools)")?;
        let text = String::from_utf8_lossy(&output.stdout);
        // A header line, then "GET","123456.78",...
        let rate = text.lines().last().and_then(|line| line.split(',').nth(1));
        let rate = rate.and_then(|rate| rate.trim_matches('"').parse().ok());
        rate.with_context(|| format!("redis-benchmark printed {text:?}"))
    }
}
