//! What a region costs that is large and empty: making it, copying it virtually, and touching its
//! pages for the first time.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use farmem_region::{ByteCount, PageIndex, Version};
use farmem_wire::{
    Action, Copy, Create, Delete, HEADER_BYTES, Header, Hello, Open, PageEntry, RegionInfo, Source,
    page_checksum, seal, verify_body,
};
use farmem_workloads::content::Dice;
use serde_json::json;

use crate::content::{PAGE_BYTES, Pages};

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
    /// Touch pages of a region that is made from a file in DIR too, which the server must allow
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
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
        client.create("original", size, Source::Fill(FILL))?;
        create_ms.push(began.elapsed().as_secs_f64() * 1e3);
        client.open("original", false)?;
        let began = Instant::now();
        let copy = Copy { on_access: false, name: "copy", range: None };
        client.call(Action::Clone, |out| copy.encode(out)).context("clone")?;
        clone_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let delete = Delete { keeps_copies: true };
        client.call(Action::Delete, |out| delete.encode(out)).context("delete")?;
        let mut client = Client::connect(options.server)?;
        client.open("copy", false)?;
        client.call(Action::Delete, |_| ()).context("delete")?;
    }
    let fill = touch(options, Source::Fill(FILL))?;
    let directory = options.directory.as_deref();
    let file = directory.map(|directory| touch_file(options, directory)).transpose()?;
    crate::println_json(&json!({
        "create_ms": median(create_ms), "clone_ms": median(clone_ms),
        "first_touch_us": fill.first, "present_touch_us": fill.present,
        "file_first_touch_us": file.as_ref().map(|file| file.first),
        "file_present_touch_us": file.as_ref().map(|file| file.present),
    }))
}

/// Microseconds: medians.
struct Touches {
    /// Of a first touch.
    first: f64,
    /// Of a touch of a page that is there.
    present: f64,
}

/// Touches each page of a region, and again when it is there: pages of a fill are not made by reading, so
/// they are written in between.
fn touch(options: &RegionOptions, source: Source<'_>) -> anyhow::Result<Touches> {
    /// Pages that are touched for the first time before they are touched again.
    const TURN_PAGES: usize = 256;
    let is_fill = matches!(source, Source::Fill(_));
    let contents = Pages::new();
    let mut client = Client::connect(options.server)?;
    client.create("touched", ByteCount::new(options.pages * PAGE_BYTES as u64), source)?;
    client.open("touched", true)?;
    let mut order: Vec<u64> = (0..options.pages).collect();
    let mut dice = Dice::new(1);
    for at in (1..order.len()).rev() {
        order.swap(at, dice.below(at as u64 + 1) as usize);
    }
    let (mut first, mut present) = (Vec::new(), Vec::new());
    for turn in order.chunks(TURN_PAGES) {
        for page in turn {
            let content = client.read(*page, &mut first)?;
            if is_fill {
                ensure!(content == [FILL; PAGE_BYTES], "wrong bytes in page {page}");
            } else {
                contents.check(*page, content)?;
            }
        }
        for page in turn.iter().filter(|_| is_fill) {
            client.write(*page, &contents)?;
        }
        for page in turn {
            let content = client.read(*page, &mut present)?;
            contents.check(*page, content)?;
        }
    }
    let stored = client.stored()?;
    ensure!(
        stored == options.pages,
        "{} pages were touched as present ones, and the region holds {stored}",
        options.pages
    );
    client.call(Action::Delete, |_| ()).context("delete")?;
    Ok(Touches { first: median(first), present: median(present) })
}

/// Makes a file of the pages that a region is to be made from.
fn touch_file(options: &RegionOptions, directory: &Path) -> anyhow::Result<Touches> {
    let file = directory.join(format!("pageload-{}", std::process::id()));
    let contents = Pages::new();
    let mut bytes = Vec::new();
    (0..options.pages).for_each(|page| contents.append(page, &mut bytes));
    let path = file.to_str().context("the directory's name is not UTF-8")?;
    fs::write(&file, bytes).with_context(|| format!("write {path}"))?;
    let touches = touch(options, Source::File { path, offset: 0 });
    let _ = fs::remove_file(&file);
    touches
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

    fn create(&mut self, name: &str, size: ByteCount, source: Source<'_>) -> anyhow::Result<()> {
        let page_bytes = PAGE_BYTES as u32;
        let create = Create { name, size, page_bytes, source, prefers: None };
        let created = self.call(Action::Create, |out| create.encode(out));
        created.map(drop).with_context(|| format!("create a region of {} bytes", size.get()))
    }

    /// `writes`: as the one who may write.
    fn open(&mut self, name: &str, writes: bool) -> anyhow::Result<()> {
        let open = Open { take_over: writes, name };
        let reply = self.call(Action::Open, |out| open.encode(out)).context("open")?;
        self.session = Header { reply: false, entries: 0, payload: 0, server_nanos: 0, ..reply };
        Ok(())
    }

    /// Reads a page, and adds how long that took.
    fn read(&mut self, page: u64, times: &mut Vec<f64>) -> anyhow::Result<&[u8]> {
        let began = Instant::now();
        let entry = PageEntry { page: PageIndex::new(page), ..PageEntry::default() };
        self.session.entries = 1;
        let reply = self.call(Action::Read, |out| entry.encode(out));
        self.session.entries = 0;
        let content = &self.reply[reply?.covered_bytes()..];
        times.push(began.elapsed().as_secs_f64() * 1e6);
        Ok(content)
    }

    /// Writes a page that was never written.
    fn write(&mut self, page: u64, contents: &Pages) -> anyhow::Result<()> {
        let (page, version) = (PageIndex::new(page), Version::new(1));
        let mut bytes = Vec::with_capacity(PAGE_BYTES);
        contents.append(page.get(), &mut bytes);
        let content = bytes.as_slice().try_into().context("a page of another size")?;
        let checksum = page_checksum(self.session.region, page, version, content);
        let entry = PageEntry { page, version, checksum, slot: 0 };
        (self.session.entries, self.session.payload) = (1, PAGE_BYTES as u32);
        let reply = self.ask(Action::Write, |out| entry.encode(out), &bytes);
        (self.session.entries, self.session.payload) = (0, 0);
        reply.map(drop)
    }

    /// How many pages the region holds.
    fn stored(&mut self) -> anyhow::Result<u64> {
        let reply = self.call(Action::Show, |_| ()).context("show")?;
        let (info, _) = RegionInfo::decode(&self.reply[..reply.covered_bytes()])?;
        Ok(info.stored.get())
    }

    /// Sends a request and waits for its reply, of which the rest is kept.
    fn call(&mut self, action: Action, rest: impl FnOnce(&mut Vec<u8>)) -> anyhow::Result<Header> {
        self.ask(action, rest, &[])
    }

    /// The same, with pages behind it.
    fn ask(
        &mut self,
        action: Action,
        rest: impl FnOnce(&mut Vec<u8>),
        payload: &[u8],
    ) -> anyhow::Result<Header> {
        self.session.request += 1;
        self.message.clear();
        self.message.resize(HEADER_BYTES, 0);
        rest(&mut self.message);
        seal(Header { action, ..self.session }, &mut self.message);
        self.message.extend_from_slice(payload);
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

#[cfg(test)]
mod tests {
    use farmem_memserver::{MemServer, ServerConfig};
    use farmem_transport::Endpoint;

    use super::*;

    #[test]
    fn pages_are_touched_that_are_not_there_and_then_are() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().canonicalize().unwrap();
        let listen = Endpoint::Tcp("127.0.0.1:0".parse().unwrap());
        let mut config = ServerConfig::new(vec![listen], ByteCount::new(64 << 20));
        config.directories = vec![directory.clone()];
        let server = MemServer::bind(config).unwrap();
        let Some(Endpoint::Tcp(address)) = server.endpoints().next().cloned() else {
            panic!("not TCP");
        };
        let stop = server.stop_handle();
        let thread = std::thread::spawn(move || server.run().map(drop));
        let options =
            RegionOptions { server: address, gibibytes: 1, count: 1, pages: 600, directory: None };
        // Each of them fails unless all pages were there when they were touched again.
        let fill = touch(&options, Source::Fill(FILL)).unwrap();
        let file = touch_file(&options, &directory).unwrap();
        assert!([fill.first, fill.present, file.first, file.present].iter().all(|us| *us > 0.0));
        stop.stop();
        thread.join().unwrap().unwrap();
    }
}
