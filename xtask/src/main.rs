//! `cargo xtask`: everything that is done to this workspace besides editing it.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod ci;
mod conform;
mod provenance;
mod stage;
mod tidy;
mod verify;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Build farmem, its preload library and its pager side by side.
    Build(build::BuildOptions),
    /// Build them optimised and install them.
    Install(build::InstallOptions),
    /// Check the rules of this workspace that no compiler knows.
    Tidy,
    /// Everything that a change must pass.
    Ci,
    /// Measure.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run real test suites under farmem and compare their verdicts with those of native runs.
    Conform(conform::ConformOptions),
    /// Run real programs under farmem and compare what they compute with their native runs.
    Verify(verify::VerifyOptions),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Build(options) => build::build(&options),
        Task::Install(options) => build::install(&options),
        Task::Tidy => tidy::tidy(),
        Task::Ci => ci::ci(),
        Task::Bench(command) => bench::bench(&command),
        Task::Conform(options) => conform::conform(&options),
        Task::Verify(options) => verify::verify(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
