//! One plain TCP stream: the most that a server could reach over the same connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;

/// Bytes that are sent and received at a time.
const BUFFER_BYTES: usize = 256 << 10;

#[derive(Args)]
pub(crate) struct ReceiveOptions {
    /// Who sends
    #[arg(long)]
    server: SocketAddr,
    /// How long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

#[derive(Args)]
pub(crate) struct SendOptions {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
}

/// Receives for a while.
pub(crate) fn receive(options: &ReceiveOptions) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(options.server).context("connect")?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut receive = |seconds: f64| -> anyhow::Result<f64> {
        let (began, mut bytes) = (Instant::now(), 0);
        while began.elapsed().as_secs_f64() < seconds {
            let received = stream.read(&mut buffer).context("receive")?;
            ensure!(received > 0, "the sender has gone");
            bytes += received;
        }
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    };
    receive(options.seconds * 0.1)?;
    let bytes_per_second = receive(options.seconds)?;
    crate::println_json(&json!({ "bytes_per_second": bytes_per_second }))
}

/// Sends to one receiver after another, until killed.
pub(crate) fn send(options: &SendOptions) -> anyhow::Result<()> {
    let listener = TcpListener::bind(options.listen).context("listen")?;
    let buffer = vec![0x5a; BUFFER_BYTES];
    for stream in listener.incoming() {
        let mut stream = stream.context("accept")?;
        // Until the receiver has had enough.
        while stream.write_all(&buffer).is_ok() {}
    }
    Ok(())
}
