//! The text protocol of memcached.

use std::collections::VecDeque;
use std::io::Write;

use anyhow::bail;

use crate::content::{PAGE_BYTES, Pages};
use crate::protocol::{Part, Protocol, line};

/// Nothing has to be remembered between replies.
pub(crate) struct Memcached;

impl Protocol for Memcached {
    fn store(&mut self, page: u64, pages: &Pages, out: &mut Vec<u8>) {
        let _ = write!(out, "set p{page} 0 0 {PAGE_BYTES}\r\n");
        pages.append(page, out);
        out.extend_from_slice(b"\r\n");
    }

    fn ask(&mut self, wanted: &[u64], out: &mut Vec<u8>) {
        out.extend_from_slice(b"get");
        for page in wanted {
            let _ = write!(out, " p{page}");
        }
        out.extend_from_slice(b"\r\n");
    }

    fn take(&mut self, bytes: &[u8], expected: &VecDeque<u64>) -> anyhow::Result<Option<Part>> {
        let Some(line) = line(bytes) else {
            return Ok(None);
        };
        let head = line.len() + 2;
        if line == b"END" || line == b"STORED" {
            return Ok(Some(Part::of(head, true)));
        }
        let is_next = |key: &[u8]| {
            let page = str::from_utf8(key).ok().and_then(|key| key.parse().ok());
            page.is_some() && page.as_ref() == expected.front()
        };
        let key = line.strip_prefix(b"VALUE p").and_then(|rest| rest.strip_suffix(b" 0 4096"));
        if !key.is_some_and(is_next) {
            bail!("memcached said {:?}", String::from_utf8_lossy(line));
        }
        let whole = head + PAGE_BYTES + 2;
        let page = Some(head..head + PAGE_BYTES);
        Ok((bytes.len() >= whole).then_some(Part { bytes: whole, page, ends: false }))
    }
}
