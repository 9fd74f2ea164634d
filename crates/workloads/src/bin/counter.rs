//! One thread increments counters, one in each of a few pages, as fast as it can, while another
//! passes over memory so that those pages are taken away again and again. An eviction that loses
//! a store loses increments.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use farmem_workloads::{EXIT_WRONG_BYTE, PAGE_BYTES, PAGE_WORDS};
use serde::Serialize;

#[derive(Parser)]
struct Arguments {
    /// Memory that the other thread passes over, in MiB: more than the program may keep.
    #[arg(long, default_value_t = 256)]
    mebibytes: usize,
    /// Pages with a counter.
    #[arg(long, default_value_t = 64)]
    pages: usize,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

#[derive(Serialize)]
struct Report {
    increments: u64,
    lost_increments: u64,
    passes_of_pressure: u64,
}

#[expect(clippy::print_stdout, reason = "the result is this program's output")]
fn main() -> ExitCode {
    let report = run(&Arguments::parse());
    println!("{}", serde_json::to_string(&report).expect("a report is plain data"));
    if report.lost_increments == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG_BYTE) }
}

fn run(arguments: &Arguments) -> Report {
    let words = arguments.pages.max(1) * PAGE_WORDS;
    let memory: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
    let until = Instant::now() + Duration::from_secs_f64(arguments.seconds);
    let stop = AtomicBool::new(false);
    let (rounds, passes_of_pressure) = std::thread::scope(|scope| {
        let pressure = scope.spawn(|| press(arguments.mebibytes << 20, &stop));
        let rounds = increment_until(&memory, until);
        stop.store(true, Ordering::Relaxed);
        (rounds, pressure.join().expect("no panic"))
    });
    let counters = memory.iter().step_by(PAGE_WORDS);
    let counted: Vec<u64> = counters.map(|counter| counter.load(Ordering::Relaxed)).collect();
    for (page, found) in counted.iter().enumerate().filter(|(_, found)| **found != rounds) {
        eprintln!("counter: wrong byte: page {page}: expected {rounds}, found {found}");
    }
    Report {
        increments: rounds * counted.len() as u64,
        lost_increments: counted.iter().map(|found| rounds.abs_diff(*found)).sum(),
        passes_of_pressure,
    }
}

/// Adds one to the first word of every page, over and over; returns how often. A plain load and
/// a plain store, as a program's own increment is.
fn increment_until(memory: &[AtomicU64], until: Instant) -> u64 {
    const ROUNDS_PER_LOOK: u64 = 64;
    let mut rounds = 0;
    while Instant::now() < until {
        for _ in 0..ROUNDS_PER_LOOK {
            for counter in memory.iter().step_by(PAGE_WORDS) {
                let value = counter.load(Ordering::Relaxed);
                counter.store(value + 1, Ordering::Relaxed);
            }
        }
        rounds += ROUNDS_PER_LOOK;
    }
    rounds
}

/// Writes one byte of every page of `bytes` bytes, again and again.
fn press(bytes: usize, stop: &AtomicBool) -> u64 {
    let mut memory = vec![0u8; bytes];
    let mut passes = 0;
    while !stop.load(Ordering::Relaxed) {
        passes += 1;
        for byte in memory.iter_mut().step_by(PAGE_BYTES) {
            *byte = byte.wrapping_add(1);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    passes
}
