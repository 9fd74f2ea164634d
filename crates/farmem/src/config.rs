//! The configuration file: `--config FILE`, or /etc/farmem/farmem.toml if there is one.
//!
//! It has a table for each command and in it a key for each flag, under the flag's name; `region` and
//! `server` have those that have a variable. What it says takes the place of a flag's default: the command
//! line and the environment win.
//!
//! ```toml
//! [run]
//! local = "16GiB"
//! server = "memory.example:7070"
//! ```

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::Resettable;
use clap::error::ErrorKind;
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
    /// It asks for help, or the version.
    is_question: bool,
    /// The file that the command line or the environment names.
    file: Option<PathBuf>,
}

impl Look {
    pub(crate) fn at(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let matches = Cli::command().ignore_errors(true).try_get_matches_from(arguments);
        // Of errors only those are left that are none.
        let Ok(matches) = matches else { return Self { is_question: true, ..Self::default() } };
        let serve = matches.subcommand_matches("serve");
        let private = serve.and_then(|serve| serve.try_get_one::<i32>("private").ok().flatten());
        Self {
            is_private: private.is_some(),
            is_question: false,
            is_run: matches.subcommand_name() == Some("run"),
            file: matches.try_get_one::<PathBuf>("config").ok().flatten().cloned(),
        }
    }
}

/// The definition of the command line, with defaults from the configuration file, which a private server
/// does not read. Help is given whatever is wrong with it.
///
/// # Errors
/// The file cannot be read, is not TOML, or has a table, a key or a value that no command or flag has.
pub(crate) fn command(look: &Look) -> anyhow::Result<Command> {
    command_with(look, Path::new(DEFAULT_FILE))
}

fn command_with(look: &Look, default: &Path) -> anyhow::Result<Command> {
    if look.is_private {
        return Ok(Cli::command());
    }
    match read(look.file.as_deref(), default) {
        Err(_) if look.is_question => Ok(Cli::command()),
        read => read,
    }
}

fn read(named: Option<&Path>, default: &Path) -> anyhow::Result<Command> {
    let file = named.unwrap_or(default);
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
        let Some(found) = command.find_subcommand(&name) else {
            bail!("[{name}]: there is no such command");
        };
        let defaults = keys
            .iter()
            .map(|(key, value)| {
                default(found, key, value).with_context(|| format!("[{name}] {key}"))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(command.mut_subcommand(name, |found| {
            defaults.into_iter().fold(found, |found, (id, value)| set(found, &id, &value))
        }))
    })
}

/// A flag, by its id, and its value, which it takes.
fn default(command: &Command, key: &str, value: &Value) -> anyhow::Result<(String, String)> {
    let known = flags(command);
    if known.is_empty() {
        bail!("the command takes no keys");
    }
    if !known.iter().any(|known| known == key) {
        bail!("there is no such key; keys are {}", known.join(", "));
    }
    let (id, value) = (key.replace('-', "_"), plain(value)?);
    let alone = commands(command).find(|command| has(command, &id));
    alone.map_or(Ok(()), |alone| check(alone, &id, &value))?;
    Ok((id, value))
}

/// Fails if the flag does not take the value.
fn check(command: &Command, id: &str, value: &str) -> anyhow::Result<()> {
    // Of the environment nothing is to be told here.
    let alone = command.clone().mut_args(|flag| flag.env(Resettable::Reset));
    match set(alone, id, value).try_get_matches_from([command.get_name()]) {
        Err(error)
            if matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) =>
        {
            let text = error.to_string();
            let first = text.strip_prefix("error: ").unwrap_or(&text).lines();
            let first: Vec<_> = first.take_while(|line| !line.is_empty()).map(str::trim).collect();
            bail!("{}", first.join(" "))
        }
        // What else is missing is told when the command line is parsed.
        _ => Ok(()),
    }
}

/// Gives a flag another default, in each of a command's commands that has it.
fn set(command: Command, id: &str, value: &str) -> Command {
    if has(&command, id) {
        let value = value.to_owned();
        return command.mut_arg(id, |flag| flag.default_value(value));
    }
    command.mut_subcommands(|found| if has(&found, id) { set(found, id, value) } else { found })
}

fn has(command: &Command, id: &str) -> bool {
    command.get_arguments().any(|flag| flag.get_id() == id)
}

/// The command, or those that it consists of.
fn commands(command: &Command) -> impl Iterator<Item = &Command> {
    let alone = (!command.has_subcommands()).then_some(command);
    alone.into_iter().chain(command.get_subcommands())
}

/// Names of the flags that a file may set: of a command that consists of others those that may stand in
/// the environment too, which mean the same in each of them.
fn flags(command: &Command) -> Vec<String> {
    let is_whole = !command.has_subcommands();
    let shown = commands(command).flat_map(Command::get_arguments);
    let shown = shown.filter(|flag| !flag.is_hide_set() && (is_whole || flag.get_env().is_some()));
    let mut names: Vec<String> =
        shown.filter_map(|flag| flag.get_long()).map(str::to_owned).collect();
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
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
    fn commands_of_a_command_have_what_all_of_them_mean() {
        let file = "[region]\nserver = 'a:1'\n[server]\nserver = 'b:1'\n";
        let server = |arguments: &[&str]| {
            let command = with_defaults(Cli::command(), file).unwrap();
            let matches = command.try_get_matches_from(arguments).unwrap();
            match Cli::from_arg_matches(&matches).unwrap().command {
                cli::Command::Region(cli::RegionCommand::List(options)) => options.server.server,
                cli::Command::Region(cli::RegionCommand::Copy(options)) => options.server.server,
                cli::Command::Server(cli::ServerCommand::Show(options)) => options.server,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(server(&["farmem", "region", "list"]), "a:1");
        assert_eq!(server(&["farmem", "region", "copy", "x", "y"]), "a:1");
        assert_eq!(server(&["farmem", "region", "list", "--server", "c:1"]), "c:1");
        assert_eq!(server(&["farmem", "server", "show"]), "b:1");
    }

    #[test]
    fn help_is_given_whatever_is_wrong_with_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("farmem.toml");
        fs::write(&file, "[run").unwrap();
        let found = |arguments: &[&str]| {
            let look = Look::at(arguments.iter().map(OsString::from));
            command_with(&look, &file).is_ok()
        };
        for question in [&["farmem", "--help"][..], &["farmem", "run", "-h"], &["farmem", "-V"]] {
            assert!(found(question), "{question:?}");
        }
        assert!(!found(&["farmem", "run", "true"]));
        assert!(!found(&["farmem", "run", "ls", "--help"]), "that is the program's");
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
            ("[region]\nsize = '1G'", "[region] size: there is no such key; keys are server"),
            ("[completion]\nshell = 'bash'", "[completion] shell: the command takes no keys"),
            ("[run]\nlocal = '4X'", "[run] local: invalid value '4X' for '--local <SIZE>': `X`"),
            ("[serve]\nlog-form = 'xml'", "[serve] log-form: invalid value 'xml'"),
            ("[serve]\ntier = 'tape=1G'", "[serve] tier: invalid value"),
            ("[run", "TOML"),
        ] {
            let error = format!("{:#}", with_defaults(Cli::command(), file).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
