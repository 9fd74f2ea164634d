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
mod standard_output;
mod successor;
mod table;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::cli::{Cli, Command, CompletionOptions, ServerCommand};
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
        Command::Completion(options) => ending(complete(&options)),
    }
}

fn complete(options: &CompletionOptions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "farmem", &mut script);
    standard_output::write(script)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the usage error, help or version that clap made.
fn usage(error: &clap::Error, runs: bool) -> ExitCode {
    if !error.use_stderr() {
        let text = error.render();
        let text =
            if io::stdout().is_terminal() { text.ansi().to_string() } else { text.to_string() };
        return ending(standard_output::write(text).map(|()| ExitCode::SUCCESS));
    }
    // Nothing is left to be done where nothing can be printed.
    let _ = error.print();
    match runs {
        // Any other status would be taken for the program's.
        true => ExitCode::from(run::OWN_FAILURE),
        false => ExitCode::from(USAGE),
    }
}

fn ending(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        if !error.is::<standard_output::Unread>() {
            say(&error);
        }
        ExitCode::from(FAILURE)
    })
}

/// Tells a person what failed and why, in one line.
fn say(error: &anyhow::Error) {
    standard_error::tell(format_args!("{error:#}"));
}
