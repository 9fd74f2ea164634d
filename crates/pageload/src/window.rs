//! The loop: keeps a number of requests under way on one connection, and checks what comes back.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::content::Pages;
use crate::protocol::Protocol;

/// Bytes that are received at a time. What has come is looked at while it is in the second-level
/// cache.
const INPUT_BYTES: usize = 256 << 10;

/// A connection with requests under way.
pub(crate) struct Window {
    stream: TcpStream,
    input: Vec<u8>,
    /// Pages that are asked for and have not come.
    expected: VecDeque<u64>,
    output: Vec<u8>,
}

/// What a run has done.
#[derive(Default)]
pub(crate) struct Done {
    pub(crate) requests: u64,
    pub(crate) pages: u64,
}

impl Window {
    pub(crate) fn connect(server: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
        stream.set_nodelay(true)?;
        let (input, expected) = (vec![0; INPUT_BYTES], VecDeque::new());
        Ok(Self { stream, input, expected, output: Vec::new() })
    }

    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Keeps `depth` requests under way until `next` appends no more, and all are answered. All
    /// that can be sent is sent at once, before more is received.
    pub(crate) fn run(
        &mut self,
        protocol: &mut dyn Protocol,
        pages: &Pages,
        depth: usize,
        mut next: impl FnMut(&mut dyn Protocol, &mut Vec<u8>, &mut VecDeque<u64>) -> bool,
    ) -> anyhow::Result<Done> {
        let (mut done, mut under_way, mut filled) = (Done::default(), 0, 0);
        loop {
            while under_way < depth && next(protocol, &mut self.output, &mut self.expected) {
                under_way += 1;
            }
            if under_way == 0 {
                ensure!(filled == 0, "{filled} bytes came that nobody asked for");
                return Ok(done);
            }
            self.stream.write_all(&self.output).context("send")?;
            self.output.clear();
            let received = self.stream.read(&mut self.input[filled..]).context("receive")?;
            ensure!(received > 0, "the server closed the connection");
            filled += received;
            let answered = self.check(protocol, pages, &mut filled, &mut done)?;
            under_way -= answered;
            done.requests += answered as u64;
        }
    }

    /// Checks all that is complete, and moves the rest to the front; returns replies ended.
    fn check(
        &mut self,
        protocol: &mut dyn Protocol,
        pages: &Pages,
        filled: &mut usize,
        done: &mut Done,
    ) -> anyhow::Result<usize> {
        let (mut at, mut answered) = (0, 0);
        while let Some(part) = protocol.take(&self.input[at..*filled], &self.expected)? {
            if let Some(range) = part.page {
                let page = self.expected.pop_front().context("more pages than asked for")?;
                pages.check(page, &self.input[at + range.start..at + range.end])?;
                done.pages += 1;
            }
            at += part.bytes;
            answered += usize::from(part.ends);
        }
        ensure!(at > 0 || *filled < self.input.len(), "a part of a reply is too long");
        self.input.copy_within(at..*filled, 0);
        *filled -= at;
        Ok(answered)
    }
}

/// Says when it is time to stop.
pub(crate) struct Clock {
    began: Instant,
    time: Duration,
}

impl Clock {
    pub(crate) fn start(time: Duration) -> Self {
        Self { began: Instant::now(), time }
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.began.elapsed() >= self.time
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}
