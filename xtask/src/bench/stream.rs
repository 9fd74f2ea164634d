//! What one plain TCP stream over loopback carries: the most that paging over TCP could reach.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::Context;

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
