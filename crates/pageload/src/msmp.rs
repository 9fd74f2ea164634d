//! MSMP, the protocol of farmem.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, ensure};
use farmem_region::{ByteCount, PageCount, PageIndex, Version};
use farmem_wire::{
    Action, HEADER_BYTES, Header, Hello, Malloc, PageEntry, Setup, page_checksum, seal, verify_body,
};

use crate::content::{PAGE_BYTES, Pages};
use crate::protocol::{Part, Protocol};

/// The one version that every page has.
const VERSION: Version = Version::new(1);

/// A session with a region.
pub(crate) struct Msmp {
    /// What requests of the session start from.
    session: Header,
    next_request: u64,
    next_reply: u64,
    /// Pages of a reply that are still to come.
    left: usize,
    content: Vec<u8>,
}

impl Msmp {
    /// Says hello, and sets up a session with a region of that many pages.
    pub(crate) fn begin(stream: &mut TcpStream, pages: u64) -> anyhow::Result<Self> {
        let hello = Hello { oldest: 1, newest: 1, share_arena: false };
        let request = Header::request(Action::Hello, 1);
        call(stream, request, |out| hello.encode(out)).context("hello")?;
        let amount = ByteCount::new(pages * PAGE_BYTES as u64);
        let (accept_partial, dynamic) = (false, false);
        let setup = Setup { amount, accept_partial, dynamic, name: "pageload", credentials: &[] };
        let request = Header::request(Action::Setup, 2);
        let session = call(stream, request, |out| setup.encode(out)).context("setup")?;
        let malloc = Malloc { from: PageCount::new(0), add: PageCount::new(pages) };
        let request = Header { action: Action::Malloc, request: 3, reply: false, ..session };
        let request = Header { entries: 0, payload: 0, ..request };
        call(stream, request, |out| malloc.encode(out)).context("malloc")?;
        Ok(Self { session, next_request: 4, next_reply: 4, left: 0, content: Vec::new() })
    }

    fn request(&mut self, action: Action, entries: usize, payload: usize) -> Header {
        self.next_request += 1;
        Header {
            action,
            reply: false,
            request: self.next_request - 1,
            entries: entries as u32,
            payload: payload as u32,
            ..self.session
        }
    }
}

impl Protocol for Msmp {
    fn store(&mut self, page: u64, pages: &Pages, out: &mut Vec<u8>) {
        let header = self.request(Action::Write, 1, PAGE_BYTES);
        self.content.clear();
        pages.append(page, &mut self.content);
        let content = self.content.as_slice().try_into().expect("a whole page");
        let page = PageIndex::new(page);
        let checksum = page_checksum(header.region, page, VERSION, content);
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        PageEntry { page, version: VERSION, checksum, slot: 0 }.encode(out);
        seal(header, &mut out[start..]);
        out.extend_from_slice(&self.content);
    }

    fn ask(&mut self, wanted: &[u64], out: &mut Vec<u8>) {
        let header = self.request(Action::Read, wanted.len(), 0);
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        for page in wanted {
            PageEntry { page: PageIndex::new(*page), ..PageEntry::default() }.encode(out);
        }
        seal(header, &mut out[start..]);
    }

    fn take(&mut self, bytes: &[u8], expected: &VecDeque<u64>) -> anyhow::Result<Option<Part>> {
        if self.left > 0 {
            if bytes.len() < PAGE_BYTES {
                return Ok(None);
            }
            self.left -= 1;
            let page = Some(0..PAGE_BYTES);
            return Ok(Some(Part { bytes: PAGE_BYTES, page, ends: self.left == 0 }));
        }
        let Some((head, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let Some(covered) = rest.get(..header.covered_bytes()) else {
            return Ok(None);
        };
        verify_body(&header, covered)?;
        if let Some(refusal) = header.refusal {
            anyhow::bail!("the server refused: {}", refusal.text());
        }
        ensure!(header.reply && header.request == self.next_reply, "not the reply that is next");
        self.next_reply += 1;
        if header.action == Action::Read {
            self.left = header.entries as usize;
            let entries = PageEntry::decode_all(&covered[..header.entry_bytes()]);
            for (entry, page) in entries.zip(expected) {
                let right = entry.page.get() == *page && entry.version == VERSION;
                ensure!(right, "not the page that was asked for");
            }
        }
        Ok(Some(Part::of(HEADER_BYTES + covered.len(), self.left == 0)))
    }
}

/// Sends a request and waits for its reply, which has no pages. Returns the reply's header.
fn call(
    stream: &mut TcpStream,
    request: Header,
    body: impl FnOnce(&mut Vec<u8>),
) -> anyhow::Result<Header> {
    let mut message = vec![0; HEADER_BYTES];
    body(&mut message);
    seal(request, &mut message);
    stream.write_all(&message)?;
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head)?;
    let header = Header::decode(&head)?;
    let mut rest = vec![0; header.covered_bytes()];
    stream.read_exact(&mut rest)?;
    verify_body(&header, &rest)?;
    match header.refusal {
        None => Ok(header),
        Some(refusal) => anyhow::bail!("the server refused: {}", refusal.text()),
    }
}
