//! Fills a redis server with incompressible values and verifies them key by key. Keys are those
//! of `redis-benchmark -r`, so that a benchmark reads and overwrites them; what it writes is one
//! and the same value everywhere, which verification accepts when told to.

use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::TcpStream;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use farmem_workloads::{Content, EXIT_WRONG_BYTE};

#[derive(Parser)]
struct Arguments {
    /// Address of the server, host:port.
    #[arg(long)]
    address: String,
    #[arg(long, default_value_t = 100_000)]
    keys: u64,
    #[arg(long, default_value_t = 1024)]
    value_bytes: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Some values may have been overwritten, all with the same one.
    #[arg(long)]
    overwritten: bool,
    action: Action,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Action {
    /// Set every key.
    Fill,
    /// Get every key and check its value.
    Verify,
}

/// A value that nobody wrote there.
#[derive(Debug)]
struct WrongValue {
    key: String,
    found: String,
}

impl std::fmt::Display for WrongValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "wrong byte: {}: the value is {}, which nobody wrote there", self.key, self.found)
    }
}

impl std::error::Error for WrongValue {}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("redis_content: {error:#}");
            ExitCode::from(if error.is::<WrongValue>() { EXIT_WRONG_BYTE } else { 1 })
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    /// Requests on the way at a time: enough to hide the round trip, few enough that neither
    /// side's socket buffer fills.
    const PIPELINED: u64 = 32;
    let stream = TcpStream::connect(&arguments.address)
        .with_context(|| format!("connect to redis at {}", arguments.address))?;
    let mut requests = BufWriter::new(stream.try_clone()?);
    let mut replies = BufReader::new(stream);
    let mut foreign: Option<Vec<u8>> = None;
    let mut overwritten = 0u64;
    let mut value = vec![0; arguments.value_bytes];
    for first in (0..arguments.keys).step_by(PIPELINED as usize) {
        let batch = first..arguments.keys.min(first + PIPELINED);
        for key in batch.clone() {
            match arguments.action {
                Action::Fill => {
                    write_value(arguments, key, &mut value);
                    request(&mut requests, &[b"SET", name(key).as_bytes(), &value])?;
                }
                Action::Verify => request(&mut requests, &[b"GET", name(key).as_bytes()])?,
            }
        }
        requests.flush()?;
        for key in batch {
            let reply =
                read_reply(&mut replies).with_context(|| format!("reply on {}", name(key)))?;
            if arguments.action == Action::Fill {
                ensure!(reply == b"OK", "redis answered {}", reply.escape_ascii());
                continue;
            }
            write_value(arguments, key, &mut value);
            if reply == value {
                continue;
            }
            let plausible = arguments.overwritten && reply.len() == arguments.value_bytes;
            if !plausible || *foreign.get_or_insert_with(|| reply.clone()) != reply {
                let found = reply[..reply.len().min(40)].escape_ascii().to_string();
                bail!(WrongValue { key: name(key), found });
            }
            overwritten += 1;
        }
    }
    eprintln!("redis_content: {} keys right, {overwritten} of them overwritten", arguments.keys);
    Ok(())
}

/// The key as `redis-benchmark` writes it.
fn name(key: u64) -> String {
    format!("key:{key:012}")
}

fn write_value(arguments: &Arguments, key: u64, value: &mut [u8]) {
    let content = Content::new(arguments.seed);
    let words_per_value = arguments.value_bytes.div_ceil(8) as u64;
    for (word, bytes) in (key * words_per_value..).zip(value.chunks_mut(8)) {
        bytes.copy_from_slice(&content.word(word).to_le_bytes()[..bytes.len()]);
    }
}

/// Writes one command of the redis protocol (RESP2): an array of bulk strings.
fn request(output: &mut impl Write, words: &[&[u8]]) -> io::Result<()> {
    write!(output, "*{}\r\n", words.len())?;
    for word in words {
        write!(output, "${}\r\n", word.len())?;
        output.write_all(word)?;
        output.write_all(b"\r\n")?;
    }
    Ok(())
}

/// Reads one simple or bulk string.
fn read_reply(input: &mut impl BufRead) -> anyhow::Result<Vec<u8>> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    let line = line.trim_end();
    match line.split_at_checked(1) {
        Some(("+", rest)) => Ok(rest.as_bytes().to_vec()),
        Some(("$", "-1")) => bail!("no such key"),
        Some(("$", length)) => {
            let length: usize = length.parse().with_context(|| format!("length {length:?}"))?;
            ensure!(length <= 512 << 20, "a value of {length} bytes is more than redis allows");
            let mut value = vec![0; length + 2];
            input.read_exact(&mut value)?;
            value.truncate(length);
            Ok(value)
        }
        _ => bail!("redis answered {line:?}"),
    }
}
