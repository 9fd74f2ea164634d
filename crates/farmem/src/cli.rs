//! The command line: every flag once, with its environment variable.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use crate::region::cli::RegionCommand;
use crate::size::{Ratio, Size, Tier};

/// Lends the memory of other processes and machines to programs that need more than they have.
#[derive(Debug, Parser)]
#[command(name = "farmem", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Read flags from FILE [default: /etc/farmem/farmem.toml if there is one]
    #[arg(long, value_name = "FILE", global = true, env = "FARMEM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program whose memory above a local limit lives in a memory server
    #[command(after_help = RUN_HELP)]
    Run(RunOptions),
    /// Lend this machine's memory
    Serve(ServeOptions),
    /// Look at memory servers
    #[command(subcommand)]
    Server(ServerCommand),
    /// Make, copy and look after named regions of a memory server
    #[command(subcommand)]
    Region(RegionCommand),
    /// Check whether this machine can run programs under farmem, and say what to change
    Doctor(DoctorOptions),
    /// Print a script that completes farmem's commands and flags in a shell
    Completion(CompletionOptions),
}

const RUN_HELP: &str = "\
Without --server, farmem starts a private memory server on this machine for the time of the run.

The exit status is the program's. 125 means that farmem itself failed, or had to stop the program \
because memory was lost; 126 that the program cannot be executed; 127 that it was not found.";

/// `farmem run`.
#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// Memory that the program and its children may have on this machine, at least 16MiB
    /// [default: four fifths of what the machine or the control group has available]
    #[arg(long, value_name = "SIZE", env = "FARMEM_LOCAL")]
    pub(crate) local: Option<Size>,
    /// The memory server: HOST:PORT or unix:PATH [default: a private one]
    #[arg(long, value_name = "ADDR", env = "FARMEM_SERVER")]
    pub(crate) server: Option<String>,
    /// Put what the memory server has no room for into a file in DIR, which is gone with the program
    #[arg(long, value_name = "DIR", env = "FARMEM_SPILL")]
    pub(crate) spill: Option<PathBuf>,
    /// Write counts and latencies to FILE as JSON when the program has ended
    #[arg(long, value_name = "FILE", env = "FARMEM_STATS")]
    pub(crate) stats: Option<PathBuf>,
    /// Say nothing but errors
    #[arg(long, short, env = "FARMEM_QUIET", value_parser = FalseyValueParser::new())]
    pub(crate) quiet: bool,
    /// Show a live line while the program runs, if standard error is a terminal
    #[arg(long, env = "FARMEM_PROGRESS", value_parser = FalseyValueParser::new())]
    pub(crate) progress: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

/// `farmem serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeOptions {
    /// Where to listen: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070", env = "FARMEM_LISTEN")]
    pub(crate) listen: String,
    /// Memory to lend [default: half of what the machine or the control group has available]
    #[arg(long, value_name = "SIZE", env = "FARMEM_MEMORY")]
    pub(crate) memory: Option<Size>,
    /// Answer HTTP requests for metrics, in the format of Prometheus, at IP:PORT [default: nowhere]
    #[arg(long, value_name = "ADDR", env = "FARMEM_METRICS")]
    pub(crate) metrics: Option<std::net::SocketAddr>,
    /// Form of the log, which goes to standard error
    #[arg(long, value_name = "FORM", default_value = "text", env = "FARMEM_LOG_FORM")]
    pub(crate) log_form: LogForm,
    /// A tier below memory for cold pages: compressed=SIZE keeps pages of up to SIZE compressed in
    /// that memory, file=DIR:SIZE puts up to SIZE in a nameless file in DIR. May be given for each
    #[arg(long, value_name = "TIER", env = "FARMEM_TIER", value_delimiter = ',')]
    pub(crate) tier: Vec<Tier>,
    /// Promise clients so many times what memory and tiers hold
    #[arg(long, value_name = "N", default_value = "1", env = "FARMEM_PROMISE_RATIO")]
    pub(crate) promise_ratio: Ratio,
    /// Let regions be made from files in DIR, and write them back. May be given more than once
    #[arg(long, value_name = "DIR", env = "FARMEM_ALLOW_DIR", value_delimiter = ',')]
    pub(crate) allow_dir: Vec<PathBuf>,
    /// Keep all that is needed to go on in DIR, after the server was killed or replaced: clients do
    /// not notice but by a pause. Best on a tmpfs, as on /dev/shm
    #[arg(long, value_name = "DIR", env = "FARMEM_DATA")]
    pub(crate) data: Option<PathBuf>,
    /// Listen on an address that other machines reach, although nothing is encrypted and nobody is
    /// asked who they are
    #[arg(long, env = "FARMEM_INSECURE", value_parser = FalseyValueParser::new())]
    pub(crate) insecure: bool,
    /// Go on with what the server at the other end of standard input holds: what SIGUSR2 makes of a
    /// server
    #[arg(long, hide = true)]
    pub(crate) take_over: bool,
    /// Serve the `farmem run` with this process id, which waits for a line on standard output, and
    /// end with it
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) private: Option<i32>,
}

/// The forms of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogForm {
    /// For people.
    Text,
    /// For programs: an object of JSON in each line.
    Json,
}

/// `farmem server`.
#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Show what one memory server lends and to how many
    Show(ServerShowOptions),
}

/// `farmem server show`.
#[derive(Debug, Args)]
pub(crate) struct ServerShowOptions {
    /// The memory server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070", env = "FARMEM_SERVER")]
    pub(crate) server: String,
    /// How to print
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// `farmem doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorOptions {
    /// How to print
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// `farmem completion`.
#[derive(Debug, Args)]
pub(crate) struct CompletionOptions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// How a listing is printed.
#[derive(Debug, Args)]
pub(crate) struct OutputOptions {
    /// Form of the output
    #[arg(long, short, value_name = "FORM", default_value = "table")]
    pub(crate) output: OutputForm,
    /// The same as --output json
    #[arg(long)]
    pub(crate) json: bool,
}

impl OutputOptions {
    /// The form that the two flags ask for together.
    pub(crate) fn form(&self) -> OutputForm {
        if self.json { OutputForm::Json } else { self.output }
    }
}

/// The forms of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputForm {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_program_is_the_programs() {
        for arguments in [
            &["farmem", "run", "--local", "64MiB", "--", "sort", "--quiet", "-o"][..],
            &["farmem", "run", "--local", "64MiB", "sort", "--quiet", "-o"][..],
        ] {
            let Command::Run(options) = Cli::try_parse_from(arguments).unwrap().command else {
                panic!("not run");
            };
            assert_eq!(options.program, ["sort", "--quiet", "-o"]);
            assert_eq!(options.local, Some(Size(64 << 20)));
            assert!(!options.quiet);
        }
    }
}
