//! The configuration file: `--config FILE`, or /etc/farmem/farmem.toml if there is one.
//!
//! It has a table for each command and in it a key for each flag, under the flag's name. What it
//! says takes the place of a flag's default: the command line and the environment win.
//!
//! ```toml
//! [run]
//! local = "16GiB"
//! server = "memory.example:7070"
//! ```

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Command, CommandFactory};
use toml::{Table, Value};

use crate::cli::Cli;

/// Read if no other file is named.
const DEFAULT_FILE: &str = "/etc/farmem/farmem.toml";

/// What must be known of a command line before it is parsed for good, whatever is wrong with it.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// The command is `farmem run`.
    pub(crate) is_run: bool,
    /// It is a private server, which is as its run wants it.
    is_private: bool,
    /// The file that the command line or the environment names.
    file: Option<PathBuf>,
}

impl Look {
    pub(crate) fn at(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let matches = Cli::command().ignore_errors(true).try_get_matches_from(arguments);
        // Help and version are asked for.
        let Ok(matches) = matches else { return Self::default() };
        let serve = matches.subcommand_matches("serve");
        let private = serve.and_then(|serve| serve.try_get_one::<i32>("private").ok().flatten());
        Self {
            is_private: private.is_some(),
            is_run: matches.subcommand_name() == Some("run"),
            file: matches.try_get_one::<PathBuf>("config").ok().flatten().cloned(),
        }
    }
}

/// The definition of the command line, with defaults from the configuration file, which a private server
/// does not read.
///
/// # Errors
/// The file cannot be read, is not TOML, or has a table or a key that no command or flag has.
pub(crate) fn command(look: &Look) -> anyhow::Result<Command> {
    if look.is_private {
        return Ok(Cli::command());
    }
    let named = look.file.as_deref();
    let file = named.unwrap_or(Path::new(DEFAULT_FILE));
    match fs::read_to_string(file) {
        Ok(text) => with_defaults(Cli::command(), &text)
            .with_context(|| format!("the configuration file {} is wrong", file.display())),
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
            Ok(Cli::command())
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

fn with_defaults(command: Command, text: &str) -> anyhow::Result<Command> {
    let tables: Table = text.parse()?;
    tables.into_iter().try_fold(command, |command, (name, value)| {
        let Value::Table(keys) = value else {
            bail!("`{name}` stands outside of a table: begin with the command, as in [run]");
        };
        if command.find_subcommand(&name).is_none() {
            bail!("[{name}]: there is no such command");
        }
        let known = command.find_subcommand(&name).map(flags).unwrap_or_default();
        let defaults = keys
            .into_iter()
            .map(|(key, value)| {
                if !known.contains(&key) {
                    bail!("[{name}] {key}: there is no such key; keys are {}", known.join(", "));
                }
                Ok((
                    key.replace('-', "_"),
                    plain(&value).with_context(|| format!("[{name}] {key}"))?,
                ))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(command.mut_subcommand(name, |subcommand| {
            defaults.into_iter().fold(subcommand, |subcommand, (id, value)| {
                subcommand.mut_arg(id, |flag| flag.default_value(value))
            })
        }))
    })
}

/// Names of the flags that a file may set.
fn flags(command: &Command) -> Vec<String> {
    let shown = command.get_arguments().filter(|flag| !flag.is_hide_set());
    shown.filter_map(|flag| flag.get_long()).map(str::to_owned).collect()
}

/// The value as it would stand on the command line.
fn plain(value: &Value) -> anyhow::Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        _ => bail!("a key has a text, a whole number, true or false"),
    }
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;
    use crate::cli;
    use crate::size::Size;

    fn run_options(file: &str, arguments: &[&str]) -> cli::RunOptions {
        let command = with_defaults(Cli::command(), file).unwrap();
        let matches = command.try_get_matches_from(arguments).unwrap();
        match Cli::from_arg_matches(&matches).unwrap().command {
            cli::Command::Run(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_sets_what_the_command_line_does_not() {
        let file = "[run]\nlocal = '32MiB'\nserver = 'a:1'\nquiet = true\n[serve]\nmemory = 4096\n";
        let options = run_options(file, &["farmem", "run", "true"]);
        assert_eq!(options.local, Some(Size(32 << 20)));
        assert!(options.quiet && !options.progress);
        let options = run_options(file, &["farmem", "run", "--local", "1G", "true"]);
        assert_eq!(options.local, Some(Size(1 << 30)));
        assert_eq!(options.server.as_deref(), Some("a:1"));
    }

    #[test]
    fn a_look_finds_the_command_and_the_file_whatever_else_is_wrong() {
        for (arguments, is_run, file) in [
            (&["farmem", "--config", "F", "run", "--bogus", "true"][..], true, Some("F")),
            (&["farmem", "--config=F", "run"], true, Some("F")),
            (&["farmem", "run", "--bogus", "--config", "F", "true"], true, None),
            (&["farmem", "serve", "--bogus", "run"], false, None),
            (&["farmem"], false, None),
        ] {
            let look = Look::at(arguments.iter().map(OsString::from));
            let found = (look.is_run, look.file.as_deref());
            assert_eq!(found, (is_run, file.map(Path::new)), "{arguments:?}");
        }
    }

    #[test]
    fn a_private_server_reads_no_file() {
        let look = |more: &[&str]| {
            let arguments = ["farmem", "serve", "--config", "/no/such/file"];
            Look::at(arguments.iter().chain(more).map(OsString::from))
        };
        assert!(command(&look(&[])).is_err());
        assert!(command(&look(&["--private", "1"])).is_ok());
    }

    #[test]
    fn what_no_command_knows_is_an_error_that_names_it() {
        for (file, reason) in [
            ("[run]\nlokal = '1G'", "[run] lokal"),
            ("[rum]\nlocal = '1G'", "[rum]"),
            ("local = '1G'", "`local`"),
            ("[run]\nlocal = [1]", "[run] local"),
            ("[serve]\nprivate = 1", "[serve] private"),
            ("[run", "TOML"),
        ] {
            let error = format!("{:#}", with_defaults(Cli::command(), file).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
