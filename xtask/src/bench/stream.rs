//! What plain TCP over loopback does: a stream, the most that sequential paging could reach, and a round
//! trip, which no fault on a page that is out can do without.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::build;

/// Sends 2 GiB from one thread to another.
pub(crate) fn gigabytes_per_second() -> anyhow::Result<f64> {
    const BYTES: u64 = 2 << 30;
    const BUFFER_BYTES: usize = 256 << 10;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let mut sender = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (receiver, _) = listener.accept().context("accept")?;
    let started = Instant::now();
    let sending = thread::spawn(move || -> std::io::Result<()> {
        let buffer = vec![0x5a; BUFFER_BYTES];
        (0..BYTES / BUFFER_BYTES as u64).try_for_each(|_| sender.write_all(&buffer))
    });
    let mut receiver = receiver.take(BYTES);
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut received = 0;
    loop {
        match receiver.read(&mut buffer).context("receive")? {
            0 => break,
            bytes => received += bytes,
        }
    }
    sending.join().expect("the sender does not panic").context("send")?;
    Ok(received as f64 / 1e9 / started.elapsed().as_secs_f64())
}

/// Microseconds, the mean, that a fault takes with thread and handler on one processor and nothing to be
/// done but to copy a page in. Needs what `farmem run` needs.
pub(crate) fn bare_fault_microseconds() -> anyhow::Result<f64> {
    build::cargo(&[
        "build",
        "--quiet",
        "--release",
        "-p",
        "farmem-vmem",
        "--example",
        "bare_fault",
    ])?;
    let program = build::target_folder().join("release/examples/bare_fault");
    let output = Command::new(&program).output().with_context(|| format!("run {program:?}"))?;
    ensure!(output.status.success(), "{program:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("{program:?} printed {text:?}"))
}

/// Microseconds, the median, from a request of 64 bytes to the end of its answer of a page and a header,
/// with both ends asking their sockets all the time, on two processors.
///
/// It depends on where the processors of a virtual machine are: the same machine took 6.5 us in one
/// hour and 10.2 in another.
pub(crate) fn round_trip_microseconds() -> anyhow::Result<f64> {
    const ROUNDS: usize = 20_000;
    const REQUEST_BYTES: usize = 64;
    const ANSWER_BYTES: usize = 4096 + 64;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let mut client = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (mut server, _) = listener.accept().context("accept")?;
    for end in [&client, &server] {
        end.set_nodelay(true)?;
        end.set_nonblocking(true)?;
    }
    let serving = thread::spawn(move || -> std::io::Result<()> {
        let (mut request, answer) = ([0; REQUEST_BYTES], [0x5a; ANSWER_BYTES]);
        while read_asking(&mut server, &mut request)? {
            server.write_all(&answer)?;
        }
        Ok(())
    });
    let (request, mut answer) = ([0xa5; REQUEST_BYTES], [0; ANSWER_BYTES]);
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        client.write_all(&request)?;
        ensure!(read_asking(&mut client, &mut answer)?, "the connection ended");
        times.push(started.elapsed());
    }
    drop(client);
    serving.join().expect("the server does not panic").context("serve")?;
    times.sort_unstable();
    Ok(times[ROUNDS / 2].as_secs_f64() * 1e6)
}

/// Fills the buffer without sleeping; returns false if the other end has closed the connection.
fn read_asking(from: &mut TcpStream, mut buffer: &mut [u8]) -> std::io::Result<bool> {
    while !buffer.is_empty() {
        match from.read(buffer) {
            Ok(0) => return Ok(false),
            Ok(bytes) => buffer = &mut buffer[bytes..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
