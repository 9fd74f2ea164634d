//! `pageload`: one client that asks a server for pages as fast as it answers, in the protocol of
//! farmem, of memcached or of Redis, and compares every byte with what it stored there before.
//!
//! The same loop drives all three, so that what differs between their figures is the server. It
//! prints a line of JSON for each way of asking.

#![forbid(unsafe_code)]

mod content;
mod memcached;
mod msmp;
mod plain;
mod processor;
mod protocol;
mod redis;
mod regions;
mod window;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use farmem_workloads::content::Dice;
use serde::Serialize;

use content::Pages;
use protocol::Protocol;
use window::Window;

#[derive(Parser)]
#[command(about = "Measure how fast a server answers with pages")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Store pages, then read them at random
    Read(ReadOptions),
    /// Make large empty regions, copy them virtually, and touch pages for the first time
    Regions(regions::RegionOptions),
    /// Receive one plain TCP stream, which the same program sends
    Receive(plain::ReceiveOptions),
    /// Send one plain TCP stream to whoever connects
    Send(plain::SendOptions),
}

#[derive(Args)]
struct ReadOptions {
    /// What the server speaks
    #[arg(long)]
    protocol: Speech,
    /// The server
    #[arg(long)]
    server: SocketAddr,
    /// Pages of 4 KiB to store
    #[arg(long, default_value_t = 65_536)]
    pages: u64,
    /// How to ask: requests under way, and pages of each, as in 32x1
    #[arg(long, value_delimiter = ',', default_value = "1x1,8x1,32x1,128x1")]
    ways: Vec<Way>,
    /// How long to ask in each way
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// The server's process, to tell the processor time that it takes
    #[arg(long, value_name = "PID")]
    process: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Speech {
    Msmp,
    Memcached,
    Redis,
}

/// How to ask.
#[derive(Clone, Copy, Debug, Serialize)]
struct Way {
    /// Requests under way.
    depth: usize,
    /// Pages of each request.
    pages: usize,
}

impl std::str::FromStr for Way {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (depth, pages) = text.split_once('x').context("write DEPTHxPAGES, as in 32x1")?;
        let (depth, pages): (usize, usize) = (depth.parse()?, pages.parse()?);
        anyhow::ensure!(depth > 0 && pages > 0, "at least one request of one page");
        Ok(Self { depth, pages })
    }
}

/// What was measured.
#[derive(Serialize)]
struct Figures {
    #[serde(flatten)]
    way: Way,
    requests: u64,
    pages_read: u64,
    seconds: f64,
    pages_per_second: f64,
    /// Processor time of the server for one page, polling included.
    server_us_per_page: Option<f64>,
}

fn main() -> anyhow::Result<()> {
    match Options::parse().command {
        Command::Read(options) => read(&options),
        Command::Regions(options) => regions::regions(&options),
        Command::Receive(options) => plain::receive(&options),
        Command::Send(options) => plain::send(&options),
    }
}

fn read(options: &ReadOptions) -> anyhow::Result<()> {
    let mut window = Window::connect(options.server)?;
    let mut protocol: Box<dyn Protocol> = match options.protocol {
        Speech::Msmp => Box::new(msmp::Msmp::begin(window.stream(), options.pages)?),
        Speech::Memcached => Box::new(memcached::Memcached),
        Speech::Redis => Box::new(redis::Redis::default()),
    };
    let protocol = &mut *protocol;
    let pages = Pages::new();
    store_all(&mut window, protocol, &pages, options.pages).context("store the pages")?;
    for way in &options.ways {
        // The first tenth does not count: buffers and windows grow.
        ask(&mut window, protocol, &pages, options, *way, 0.1)?;
        let figures = ask(&mut window, protocol, &pages, options, *way, 1.0)?;
        println_json(&figures)?;
    }
    Ok(())
}

fn store_all(
    window: &mut Window,
    protocol: &mut dyn Protocol,
    pages: &Pages,
    count: u64,
) -> anyhow::Result<()> {
    /// Requests under way while storing.
    const DEPTH: usize = 16;
    let mut next = 0;
    window.run(protocol, pages, DEPTH, |protocol, output, _| {
        if next == count {
            return false;
        }
        protocol.store(next, pages, output);
        next += 1;
        true
    })?;
    Ok(())
}

/// Reads at random for a share of the time.
fn ask(
    window: &mut Window,
    protocol: &mut dyn Protocol,
    pages: &Pages,
    options: &ReadOptions,
    way: Way,
    share: f64,
) -> anyhow::Result<Figures> {
    let mut dice = Dice::new(way.depth as u64);
    let mut wanted = Vec::with_capacity(way.pages);
    let before = options.process.map(processor::seconds).transpose()?;
    let mut clock = window::Clock::start(Duration::from_secs_f64(options.seconds * share));
    let done = window.run(protocol, pages, way.depth, |protocol, output, expected| {
        if clock.is_over() {
            return false;
        }
        wanted.clear();
        wanted.extend((0..way.pages).map(|_| dice.below(options.pages)));
        protocol.ask(&wanted, output);
        expected.extend(&wanted);
        true
    })?;
    let seconds = clock.seconds();
    let after = options.process.map(processor::seconds).transpose()?;
    let busy_us = after.zip(before).map(|(after, before)| (after - before) * 1e6);
    Ok(Figures {
        way,
        requests: done.requests,
        pages_read: done.pages,
        seconds,
        pages_per_second: done.pages as f64 / seconds,
        server_us_per_page: busy_us.map(|busy| busy / done.pages as f64),
    })
}

#[expect(clippy::print_stdout, reason = "the figures are the program's output")]
fn println_json(figures: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(figures)?);
    Ok(())
}
