//! `cargo xtask bench fork`: what forking costs, and whether a Redis that is mostly out saves its
//! data at one instant.
//!
//! The cost is that of `fork` itself in a program whose resident memory is what it would be natively,
//! with eight times as much out beside it. For the save a redis-server is filled to four times its
//! limit, told to save, and overwritten meanwhile, every key of it. Then the dump is loaded into a
//! fresh server and must hold what was there at the fork: not one value of the later ones. And
//! processes that fill memory faster than pagers start must not have more together than their limit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;

use super::cases::Redis;
use crate::build;
use crate::stage::{Add, Program, Running, Stage, Variant};

#[derive(Args)]
pub(crate) struct ForkOptions {
    /// Local memory of the redis-server, of which the data is four times as much.
    #[arg(long, default_value_t = 128)]
    redis_limit_mebibytes: u64,
    /// Resident memory of the program that forks.
    #[arg(long, default_value_t = 128)]
    fork_limit_mebibytes: u64,
    /// A folder on a disk for dumps.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Not the save.
    #[arg(long)]
    no_redis: bool,
    /// Not the cost of forking.
    #[arg(long)]
    no_cost: bool,
    /// Not the peaks of processes that fill memory.
    #[arg(long)]
    no_fill: bool,
    /// Only these ways to save: what is compared belongs to one call, but one way with much data may take
    /// all the time that a machine can be had for oneself.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Variant::Native, Variant::Unix, Variant::Zram])]
    ways: Vec<Variant>,
}

/// How much more a program has out than here when it forks.
const TIMES_OUT: u64 = 8;

/// How often the cost is measured.
const ROUNDS: usize = 5;

/// Forking may cost so much more than natively, or so much longer, whichever is more.
const RATIO_MAX: f64 = 1.3;
const MORE_US_MAX: f64 = 2_000.0;

pub(crate) fn fork(options: &ForkOptions) -> anyhow::Result<()> {
    let built = build::with_workloads()?;
    let stage = Stage::prepare(built, &options.scratch, &options.ways)?;
    let mut missed = 0;
    if !options.no_cost {
        missed += cost(&stage, options.fork_limit_mebibytes)?;
    }
    if !options.no_fill {
        for (processes, mebibytes, limit_mebibytes) in FILLERS {
            missed += fill(&stage, processes, mebibytes, limit_mebibytes)?;
        }
    }
    if !options.no_redis {
        missed += save(&stage, options.redis_limit_mebibytes << 20, &options.ways)?;
    }
    ensure!(missed == 0, "{missed} bars were missed");
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the figures are the result")]
fn cost(stage: &Stage, limit_mebibytes: u64) -> anyhow::Result<usize> {
    let measure = |variant, mebibytes: u64| -> anyhow::Result<(f64, f64)> {
        let size = format!("--mebibytes={mebibytes}");
        let program = Program::new("forks", [stage.built("forks"), size]);
        let outcome = stage.run(variant, limit_mebibytes << 20, &program)?;
        let report = outcome.report()?;
        let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name}"));
        Ok((number("fork_us")?, number("write_us")?))
    };
    let (mut native, mut native_write) = (f64::MAX, f64::MAX);
    let (mut paged, mut paged_write) = (f64::MAX, f64::MAX);
    // The best of the medians, in turn: whatever else the machine does makes them longer only.
    for _ in 0..ROUNDS {
        let (call, write) = measure(Variant::Native, limit_mebibytes)?;
        (native, native_write) = (native.min(call), native_write.min(write));
        let (call, write) = measure(Variant::Unix, limit_mebibytes * (TIMES_OUT + 1))?;
        (paged, paged_write) = (paged.min(call), paged_write.min(write));
    }
    let bar = (native * RATIO_MAX).max(native + MORE_US_MAX);
    println!(
        "fork with {limit_mebibytes} MiB here: native {native:.0} us (first write after it \
         {native_write:.1} us)\n\
         with {} MiB out: {paged:.0} us ({paged_write:.1} us), {:.2} x; at most {bar:.0} us: {}",
        limit_mebibytes * TIMES_OUT,
        paged / native,
        if paged <= bar { "met" } else { "missed" }
    );
    Ok(usize::from(paged > bar))
}

/// Processes that fill memory at once, the MiB of each, and the limit of all in MiB.
const FILLERS: [(usize, u64, u64); 2] = [(3, 96, 128), (1, 256, 64)];

#[expect(clippy::print_stdout, reason = "the figures are the result")]
fn fill(stage: &Stage, processes: usize, mebibytes: u64, limit: u64) -> anyhow::Result<usize> {
    let line = format!("{} --mebibytes={mebibytes} & pids=\"$pids $!\"\n", stage.built("fills"));
    let script = line.repeat(processes) + "for pid in $pids; do wait $pid || exit 3; done\n";
    let program = Program::new("fills", ["sh".to_owned(), "-c".to_owned(), script]);
    let mut peaks = Vec::new();
    for _ in 0..ROUNDS {
        let running = stage.start(Variant::Unix, limit << 20, &program)?;
        let peak = running.watch_sum(Add::Quickly);
        running.finish()?;
        peaks.push(peak.end() >> 20);
    }
    peaks.sort_unstable();
    let most = limit + limit / 50;
    let met = peaks[ROUNDS / 2] <= most;
    println!(
        "{processes} processes that fill {mebibytes} MiB each at once, {limit} MiB here: peaks {peaks:?} \
         MiB; the median at most {most}, 2 % above: {}",
        if met { "met" } else { "missed" }
    );
    Ok(usize::from(!met))
}

/// How a save went.
#[derive(Clone, Copy)]
struct Save {
    seconds: f64,
    writes_seconds: f64,
    peak_bytes: u64,
}

/// It may take so many times as long as under zram.
const SAVE_RATIO_MAX: f64 = 2.0;

/// The bars of a save, each in words and whether it was met: without zram the time has none.
fn judge(paged: Save, swapped: Option<Save>, limit_bytes: u64) -> Vec<(String, bool)> {
    let (peak, limit) = (paged.peak_bytes >> 20, limit_bytes >> 20);
    let of_peak = format!("farmem has {peak} MiB at most; at most {limit}");
    let time = swapped.map(|swapped| {
        let ratio = paged.seconds / swapped.seconds;
        let text = format!("farmem takes {ratio:.2} x the time of zram; at most {SAVE_RATIO_MAX}");
        (text, ratio <= SAVE_RATIO_MAX)
    });
    [(of_peak, paged.peak_bytes <= limit_bytes)].into_iter().chain(time).collect()
}

#[expect(clippy::print_stdout, reason = "the figures are the result")]
fn save(stage: &Stage, limit_bytes: u64, variants: &[Variant]) -> anyhow::Result<usize> {
    let mut swapped = None;
    let mut paged = None;
    for &variant in variants {
        if let Some(reason) = stage.obstacle(variant) {
            println!("{variant}: skipped: {reason}");
            continue;
        }
        let save = save_once(stage, variant, limit_bytes).with_context(|| variant.to_string())?;
        println!(
            "redis save under writes, {} MiB of data, {} MiB here: {variant:12} {:.1} s (writes {:.1} s), \
             anonymous peak {} MiB; dump equal to the data at the fork",
            limit_bytes >> 18,
            limit_bytes >> 20,
            save.seconds,
            save.writes_seconds,
            save.peak_bytes >> 20
        );
        match variant {
            Variant::Zram => swapped = Some(save),
            Variant::Unix => paged = Some(save),
            Variant::Native | Variant::Tcp | Variant::SwapFile => {}
        }
    }
    let bars = paged.map_or_else(Vec::new, |paged| judge(paged, swapped, limit_bytes));
    for (text, met) in &bars {
        println!("{text}: {}", if *met { "met" } else { "missed" });
    }
    Ok(bars.iter().filter(|(_, met)| !met).count())
}

fn save_once(stage: &Stage, variant: Variant, limit_bytes: u64) -> anyhow::Result<Save> {
    let redis = Redis { keys: Redis::keys_of(4 * limit_bytes), requests: 0 };
    let folder = stage.scratch("redis");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder)?;
    let (running, port) = start(stage, &redis, variant, limit_bytes, &folder)?;
    redis.content(stage, &port, &["--seed=1", "fill"])?;
    let peak = running.watch_sum(Add::Proportionally);
    let started = Instant::now();
    ensure!(ask(&port, &["bgsave"])?.contains("started"), "redis does not save");
    let (saved, written) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            redis.content(stage, &port, &["--seed=2", "fill"]).map(|()| started.elapsed())
        });
        let saved = await_save(&port, started);
        let written = writer.join().unwrap_or_else(|_| Err(anyhow::anyhow!("writing failed")));
        (saved, written)
    });
    let (saved, written) = (saved?, written?);
    let peak_bytes = peak.end();
    redis.content(stage, &port, &["--seed=2", "verify"])?;
    ask(&port, &["shutdown", "nosave"])?;
    let outcome = running.finish()?;
    if variant.is_farmem() {
        require_eviction(outcome.stats.as_ref())?;
    }
    let (fresh, port) = start(stage, &redis, Variant::Native, limit_bytes, &folder)?;
    redis.content(stage, &port, &["--seed=1", "verify"]).context("the dump")?;
    ask(&port, &["shutdown", "nosave"])?;
    fresh.finish()?;
    let (seconds, writes_seconds) = (saved.as_secs_f64(), written.as_secs_f64());
    Ok(Save { seconds, writes_seconds, peak_bytes })
}

/// A save of what was never out proves nothing.
fn require_eviction(stats: Option<&Value>) -> anyhow::Result<()> {
    let evicted = stats.and_then(|stats| stats["evicted_pages"].as_u64());
    let evicted = evicted.context("it left no statistics with evicted_pages")?;
    ensure!(evicted > 0, "nothing was paged out");
    Ok(())
}

fn start<'a>(
    stage: &'a Stage,
    redis: &Redis,
    variant: Variant,
    limit_bytes: u64,
    folder: &Path,
) -> anyhow::Result<(Running<'a>, String)> {
    let port = Redis::free_port()?;
    let folder = folder.display().to_string();
    let command =
        ["redis-server", "--save", "", "--appendonly", "no", "--dir", &folder, "--port", &port];
    let program = Program::new("redis-server", command.map(str::to_owned));
    let mut running = stage.start(variant, limit_bytes, &program)?;
    redis.await_answer(&mut running, &port)?;
    Ok((running, port))
}

fn await_save(port: &str, started: Instant) -> anyhow::Result<Duration> {
    const PATIENCE: Duration = Duration::from_secs(500);
    loop {
        let state = ask(port, &["info", "persistence"])?;
        if state.contains("rdb_bgsave_in_progress:0") {
            ensure!(state.contains("rdb_last_bgsave_status:ok"), "redis could not save");
            return Ok(started.elapsed());
        }
        ensure!(started.elapsed() < PATIENCE, "redis saves for too long");
        thread::sleep(Duration::from_millis(50));
    }
}

fn ask(port: &str, words: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("redis-cli").args(["-p", port]).args(words).output();
    Ok(String::from_utf8_lossy(&output.context("run redis-cli")?.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_save_is_judged_by_its_peak_and_time_and_must_have_paged() {
        let save = |seconds, peak_mebibytes: u64| Save {
            seconds,
            writes_seconds: 1.0,
            peak_bytes: peak_mebibytes << 20,
        };
        let met = |paged, swapped| -> Vec<bool> {
            judge(paged, swapped, 128 << 20).into_iter().map(|(_, met)| met).collect()
        };
        assert_eq!(met(save(20.0, 128), Some(save(10.0, 128))), [true, true]);
        assert_eq!(met(save(21.0, 129), Some(save(10.0, 500))), [false, false]);
        assert_eq!(met(save(20.0, 129), None), [false], "with no swap to compare with too");
        for stats in [None, Some(json!({})), Some(json!({ "evicted_pages": 0 }))] {
            assert!(require_eviction(stats.as_ref()).is_err(), "{stats:?}");
        }
        assert!(require_eviction(Some(&json!({ "evicted_pages": 1 }))).is_ok());
    }
}
