//! `farmem`: lends the memory of other processes and machines to programs.
//!
//! This is the only crate that reads arguments and the environment. Each command has its module;
//! what it says to people goes to standard error, what it lists to standard output.

#![forbid(unsafe_code)]

mod artefacts;
mod cli;
mod config;
mod doctor;
mod elf;
mod log;
mod machine;
mod neighbours;
mod region;
mod run;
mod serve;
mod server;
mod size;
mod standard_error;
mod successor;
mod table;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::cli::{Cli, Command, ServerCommand};
use crate::config::Look;

/// What commands other than `run` exit with when they failed.
const FAILURE: u8 = 1;
/// What they exit with when they were called wrongly.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let look = Look::at(std::env::args_os());
    let definition = match config::command(&look) {
        Ok(definition) => definition,
        Err(error) => {
            say(&error);
            return ExitCode::from(if look.is_run { run::OWN_FAILURE } else { FAILURE });
        }
    };
    let parsed = definition.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage(&error, look.is_run),
    };
    match cli.command {
        Command::Run(options) => run::run(&options),
        Command::Serve(options) => ending(serve::serve(&options)),
        Command::Server(ServerCommand::Show(options)) => ending(server::show(&options)),
        Command::Region(command) => ending(region::run(&command)),
        Command::Doctor(options) => ending(doctor::doctor(&options)),
        Command::Completion(options) => {
            let name = "farmem";
            clap_complete::generate(options.shell, &mut Cli::command(), name, &mut io::stdout());
            ExitCode::SUCCESS
        }
    }
}

/// Prints the usage error, help or version that clap made.
fn usage(error: &clap::Error, runs: bool) -> ExitCode {
    // Nothing is left to be done where nothing can be printed.
    let _ = error.print();
    match (error.use_stderr(), runs) {
        (false, _) => ExitCode::SUCCESS,
        // Any other status would be taken for the program's.
        (true, true) => ExitCode::from(run::OWN_FAILURE),
        (true, false) => ExitCode::from(USAGE),
    }
}

fn ending(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        say(&error);
        ExitCode::from(FAILURE)
    })
}

/// Tells a person what failed and why, in one line.
fn say(error: &anyhow::Error) {
    standard_error::tell(format_args!("{error:#}"));
}
