//! Replays or searches seeds: `farmem-sim --seed 7 --steps 20000`, `farmem-sim --seeds 1000`.

#![forbid(unsafe_code)]

use clap::Parser;
use farmem_sim::{Plant, Setup, run};

/// Runs the pager's engine on simulated memory and a simulated store.
#[derive(Debug, Parser)]
struct Options {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, one after the other
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Steps of each run
    #[arg(long, default_value_t = 20_000)]
    steps: u64,
}

#[expect(clippy::print_stdout, reason = "what it prints is what it is for")]
fn main() -> anyhow::Result<()> {
    let Options { seed, seeds, steps } = Options::parse();
    for seed in seed..seed + seeds {
        let outcome = run(Setup { seed, steps, plant: Plant::Nothing })?;
        if seeds == 1 {
            println!("seed {seed}: nothing wrong; {outcome:?}");
        }
    }
    println!("{seeds} seeds: nothing wrong");
    Ok(())
}
