//! `cargo xtask`: everything that is done to this workspace besides editing it.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod stage;
mod verify;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Build farmem, its preload library and its pager side by side.
    Build(build::BuildOptions),
    /// Build them optimised and install them.
    Install(build::InstallOptions),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run real programs under farmem and compare what they compute with their native runs.
    Verify(verify::VerifyOptions),
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Build(options) => build::build(&options),
        Task::Install(options) => build::install(&options),
        Task::Bench(command) => bench::bench(&command),
        Task::Verify(options) => verify::verify(&options),
    }
}
