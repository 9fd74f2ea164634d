//! Prints what a page costs over the network of this machine: round trips of one page, operations
//! a second, and throughput beside that of a plain stream. `measure [SECONDS [unix|shm|tcp]]` spends
//! that long on each line.

#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

#[expect(dead_code, reason = "written for the tests, which use more of it")]
#[path = "../tests/it/client.rs"]
mod client;
#[path = "../tests/it/frames.rs"]
mod frames;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use client::{Client, config, fetch_pages, store_pages};
use farmem_memserver::{MemServer, ServerConfig};
use farmem_region::{ByteCount, PAGE_SIZE, Request};
use farmem_transport::Endpoint;
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Pages of a message in the throughput lines.
const BULK_PAGES: u32 = 64;
/// Messages of the throughput lines on their way at one time.
const BULK_DEPTH: u32 = 4;
/// Pages of the region that is read and written.
const REGION_PAGES: u64 = 32 << 10;

fn main() {
    let seconds = std::env::args().nth(1).map_or(1.0, |text| text.parse().expect("a number"));
    let only = std::env::args().nth(2);
    let time = Duration::from_secs_f64(seconds);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let directory = tempfile::tempdir().expect("a directory for the socket");
    let path = directory.path().join("server");
    for (name, endpoint) in [
        ("unix", Endpoint::Unix(path)),
        ("shm", Endpoint::Unix(directory.path().join("shared"))),
        ("tcp", Endpoint::Tcp("127.0.0.1:0".parse().expect("an address"))),
    ] {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        round_trips(name, &endpoint, cores, time);
        throughput(name, &endpoint, time);
    }
    plain_tcp(time);
    plain_unix(time, &directory.path().join("plain"));
}

/// One page there and back, with everything that matters to its time varied.
fn round_trips(name: &str, endpoint: &Endpoint, cores: usize, time: Duration) {
    for (server_core, client_core) in [(0, 0), (0, 1)] {
        for spin in [0, 50, 200] {
            for polls in [false, true] {
                if client_core >= cores || (server_core == client_core && spin > 50) {
                    continue;
                }
                for depth in [1, 32] {
                    let server = start(endpoint, spin, Some(server_core));
                    pin(Some(client_core));
                    let mut client = connect(&server.0);
                    client.polls = polls;
                    let line = measure(&mut client, depth, 1, false, time);
                    println!(
                        "{name:4} read 4 KiB, depth {depth:2}, cores {server_core}/{client_core}, \
                         server spins {spin:3} us, client {}: {line}",
                        if polls { "polls " } else { "blocks" },
                    );
                    stop(server, client);
                }
            }
        }
    }
    pin(None);
}

/// Many pages a message.
fn throughput(name: &str, endpoint: &Endpoint, time: Duration) {
    for writes in [false, true] {
        let server = start(endpoint, 50, None);
        let began = Instant::now();
        let mut client = connect(&server.0);
        let bytes = REGION_PAGES as f64 * PAGE_SIZE as f64;
        let rate = bytes / began.elapsed().as_secs_f64() / 1e6;
        println!(
            "{name:4} first writes, 256 pages a request, one request at a time: {rate:.0} MB/s"
        );
        let line = measure(&mut client, BULK_DEPTH, BULK_PAGES, writes, time);
        let what = if writes { "write" } else { "read" };
        println!("{name:4} {what} {BULK_PAGES} pages a message, depth {BULK_DEPTH}: {line}");
        stop(server, client);
    }
}

type Server = (Endpoint, farmem_memserver::StopHandle, thread::JoinHandle<()>);

fn start(endpoint: &Endpoint, spin_us: u64, core: Option<usize>) -> Server {
    let memory = ByteCount::new(REGION_PAGES * PAGE_SIZE as u64);
    let mut config = ServerConfig::new(vec![endpoint.clone()], memory);
    config.spin = Duration::from_micros(spin_us);
    config.share_arena = matches!(endpoint, Endpoint::Unix(path) if path.ends_with("shared"));
    let server = MemServer::bind(config).expect("a server");
    let endpoint = server.endpoints().next().expect("it listens").clone();
    let stop = server.stop_handle();
    let thread = thread::spawn(move || {
        pin(core);
        server.run().expect("it serves");
    });
    (endpoint, stop, thread)
}

fn stop((_, stop, thread): Server, client: Client) {
    drop(client);
    stop.stop();
    thread.join().expect("it ends");
}

fn connect(endpoint: &Endpoint) -> Client {
    let mebibytes = (REGION_PAGES * PAGE_SIZE as u64) >> 20;
    let mut client = Client::connect(config(endpoint, mebibytes), 256).expect("a store");
    client.grow(REGION_PAGES).expect("a region");
    for first in (0..REGION_PAGES).step_by(256) {
        client.store(first, 256, 1).expect("it stores");
    }
    client
}

fn pin(core: Option<usize>) {
    let mut set = CpuSet::new();
    match core {
        Some(core) => set.set(core),
        None => (0..64).for_each(|core| set.set(core)),
    }
    sched_setaffinity(None, &set).expect("cores");
}

/// Keeps `depth` requests of `pages` pages each on their way for some time.
fn measure(client: &mut Client, depth: u32, pages: u32, writes: bool, time: Duration) -> String {
    let mut next = 1u64;
    let mut submit = |client: &mut Client| {
        // A walk over the whole region in no order that a cache could like.
        next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let first = (next >> 33) % (REGION_PAGES - u64::from(pages));
        if writes {
            let version = client.now().get() + 2;
            client.submit(Request::Store(&store_pages(first, pages, version)))
        } else {
            let mut pages = fetch_pages(first, pages, 1);
            // Each request on its way has frames of its own.
            let base = (next >> 20) as u32 % (256 / pages.len() as u32) * pages.len() as u32;
            for page in &mut pages {
                page.frame = farmem_region::FrameId::new(base + page.frame.get());
            }
            client.submit(Request::Fetch(&pages))
        }
        .expect("there is room");
    };
    (0..depth).for_each(|_| submit(client));
    let (began, own, all) = (Instant::now(), cpu(ClockId::ThreadCPUTime), process_cpu());
    let mut finished = 0u64;
    let mut times = Vec::with_capacity(1 << 20);
    let mut last = Instant::now();
    while began.elapsed() < time {
        client.advance().expect("the server is there");
        if client.done.is_empty() {
            client.wait();
            continue;
        }
        for done in std::mem::take(&mut client.done) {
            done.result.expect("it is served");
            finished += 1;
            if depth == 1 {
                times.push(last.elapsed().as_nanos() as u64);
                last = Instant::now();
            }
            submit(client);
        }
    }
    let wall = began.elapsed().as_secs_f64();
    let own = cpu(ClockId::ThreadCPUTime) - own;
    let server = process_cpu() - all - own;
    let ops = finished as f64;
    let bytes = ops * f64::from(pages) * PAGE_SIZE as f64;
    times.sort_unstable();
    let at = |part: f64| {
        times.get((times.len() as f64 * part) as usize).map_or(0.0, |t| *t as f64 / 1e3)
    };
    format!(
        "{:7.2} us/op ({:6.0} op/s, {:5.0} MB/s), p50 {:.1} p99 {:.1} us, cpu client {:.2} us, server {:.2} us/op",
        wall * 1e6 / ops,
        ops / wall,
        bytes / wall / 1e6,
        at(0.5),
        at(0.99),
        own * 1e6 / ops,
        server * 1e6 / ops,
    )
}

fn cpu(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn process_cpu() -> f64 {
    cpu(ClockId::ProcessCPUTime)
}

fn plain_tcp(time: Duration) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let sender = TcpStream::connect(address).expect("a connection");
    let (receiver, _) = listener.accept().expect("a connection");
    plain("tcp", sender, receiver, time);
}

fn plain_unix(time: Duration, path: &std::path::Path) {
    let listener = UnixListener::bind(path).expect("a socket");
    let sender = UnixStream::connect(path).expect("a connection");
    let (receiver, _) = listener.accept().expect("a connection");
    plain("unix", sender, receiver, time);
}

/// What one stream carries, in blocks of a message's size.
fn plain(name: &str, mut to: impl Write + Send + 'static, mut from: impl Read, time: Duration) {
    const BLOCK: usize = BULK_PAGES as usize * PAGE_SIZE;
    thread::spawn(move || {
        let block = vec![7u8; BLOCK];
        while to.write_all(&block).is_ok() {}
    });
    let mut block = vec![0u8; BLOCK];
    let (began, mut bytes) = (Instant::now(), 0u64);
    while began.elapsed() < time {
        bytes += from.read(&mut block).expect("it goes on") as u64;
    }
    println!(
        "{name:4} plain stream: {:.0} MB/s",
        bytes as f64 / began.elapsed().as_secs_f64() / 1e6
    );
}
