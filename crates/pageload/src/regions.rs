//! What a region costs that is large and empty: making it, copying it virtually, and touching its
//! pages for the first time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use farmem_region::{ByteCount, PageIndex};
use farmem_wire::{
    Action, Copy, Create, Delete, HEADER_BYTES, Header, Hello, Open, PageEntry, Source, seal,
    verify_body,
};
use farmem_workloads::content::Dice;
use serde_json::json;

use crate::content::PAGE_BYTES;

#[derive(Args)]
pub(crate) struct RegionOptions {
    /// The memory server; it must promise far more than it has
    #[arg(long)]
    server: SocketAddr,
    /// GiB of the regions that are made and copied
    #[arg(long, default_value_t = 1024)]
    gibibytes: u64,
    /// How many of them, one after the other
    #[arg(long, default_value_t = 20)]
    count: u32,
    /// Pages to touch
    #[arg(long, default_value_t = 16_384)]
    pages: u64,
}

/// What pages hold that were never written.
const FILL: u8 = 7;

/// Measures all of it, and prints one line of JSON.
pub(crate) fn regions(options: &RegionOptions) -> anyhow::Result<()> {
    let size = ByteCount::new(options.gibibytes << 30);
    let (mut create_ms, mut clone_ms) = (Vec::new(), Vec::new());
    for _ in 0..options.count {
        let mut client = Client::connect(options.server)?;
        let began = Instant::now();
        client.create("original", size)?;
        create_ms.push(began.elapsed().as_secs_f64() * 1e3);
        client.open("original")?;
        let began = Instant::now();
        let copy = Copy { on_access: false, name: "copy", range: None };
        client.call(Action::Clone, |out| copy.encode(out)).context("clone")?;
        clone_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let delete = Delete { keeps_copies: true };
        client.call(Action::Delete, |out| delete.encode(out)).context("delete")?;
        let mut client = Client::connect(options.server)?;
        client.open("copy")?;
        client.call(Action::Delete, |_| ()).context("delete")?;
    }
    let (absent_us, present_us) = touch(options)?;
    crate::println_json(&json!({
        "create_ms": median(create_ms), "clone_ms": median(clone_ms),
        "first_touch_us": absent_us, "present_touch_us": present_us,
    }))
}

/// Microseconds of a first touch, and of one of a page that is there: medians.
fn touch(options: &RegionOptions) -> anyhow::Result<(f64, f64)> {
    /// Pages that are touched for the first time before they are touched again.
    const TURN_PAGES: usize = 256;
    let mut client = Client::connect(options.server)?;
    client.create("touched", ByteCount::new(options.pages * PAGE_BYTES as u64))?;
    client.open("touched")?;
    let mut order: Vec<u64> = (0..options.pages).collect();
    let mut dice = Dice::new(1);
    for at in (1..order.len()).rev() {
        order.swap(at, dice.below(at as u64 + 1) as usize);
    }
    let (mut absent, mut present) = (Vec::new(), Vec::new());
    for turn in order.chunks(TURN_PAGES) {
        for times in [&mut absent, &mut present] {
            for page in turn {
                let began = Instant::now();
                client.read(*page)?;
                times.push(began.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
    client.call(Action::Delete, |_| ()).context("delete")?;
    Ok((median(absent), median(present)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A connection that asks one thing at a time.
struct Client {
    stream: TcpStream,
    /// What requests start from.
    session: Header,
    message: Vec<u8>,
    reply: Vec<u8>,
}

impl Client {
    /// Connects and says hello.
    fn connect(server: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
        stream.set_nodelay(true)?;
        let session = Header::request(Action::Hello, 1);
        let mut client = Self { stream, session, message: Vec::new(), reply: Vec::new() };
        let hello = Hello { oldest: 1, newest: 1, share_arena: false };
        let reply = client.call(Action::Hello, |out| hello.encode(out)).context("hello")?;
        client.session.incarnation = reply.incarnation;
        Ok(client)
    }

    fn create(&mut self, name: &str, size: ByteCount) -> anyhow::Result<()> {
        let source = Source::Fill(FILL);
        let page_bytes = PAGE_BYTES as u32;
        let create = Create { name, size, page_bytes, source, prefers: None };
        let created = self.call(Action::Create, |out| create.encode(out));
        created.map(drop).with_context(|| format!("create a region of {} bytes", size.get()))
    }

    fn open(&mut self, name: &str) -> anyhow::Result<()> {
        let open = Open { take_over: false, name };
        let reply = self.call(Action::Open, |out| open.encode(out)).context("open")?;
        self.session = Header { reply: false, entries: 0, payload: 0, server_nanos: 0, ..reply };
        Ok(())
    }

    /// Reads a page, which was never written.
    fn read(&mut self, page: u64) -> anyhow::Result<()> {
        let entry = PageEntry { page: PageIndex::new(page), ..PageEntry::default() };
        self.session.entries = 1;
        let reply = self.call(Action::Read, |out| entry.encode(out));
        self.session.entries = 0;
        let content = &self.reply[reply?.covered_bytes()..];
        ensure!(content == [FILL; PAGE_BYTES], "wrong bytes in page {page}");
        Ok(())
    }

    /// Sends a request and waits for its reply, of which the rest is kept.
    fn call(&mut self, action: Action, rest: impl FnOnce(&mut Vec<u8>)) -> anyhow::Result<Header> {
        self.session.request += 1;
        self.message.clear();
        self.message.resize(HEADER_BYTES, 0);
        rest(&mut self.message);
        seal(Header { action, ..self.session }, &mut self.message);
        self.stream.write_all(&self.message).context("send")?;
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).context("receive")?;
        let header = Header::decode(&head)?;
        self.reply.resize(header.message_bytes() - HEADER_BYTES, 0);
        self.stream.read_exact(&mut self.reply).context("receive")?;
        verify_body(&header, &self.reply[..header.covered_bytes()])?;
        if let Some(refusal) = header.refusal {
            anyhow::bail!("the server refused: {}", refusal.text());
        }
        ensure!(header.request == self.session.request, "not the reply that is next");
        Ok(header)
    }
}
