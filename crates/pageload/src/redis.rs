//! RESP, the protocol of Redis.

use std::collections::VecDeque;
use std::io::Write;

use anyhow::{Context, bail};

use crate::content::{PAGE_BYTES, Pages};
use crate::protocol::{Part, Protocol, line};

/// What has come of a reply.
#[derive(Default)]
pub(crate) struct Redis {
    /// Values of an array that are still to come.
    left: usize,
}

impl Protocol for Redis {
    fn store(&mut self, page: u64, pages: &Pages, out: &mut Vec<u8>) {
        begin(out, "SET", 2);
        key(out, page);
        let _ = write!(out, "${PAGE_BYTES}\r\n");
        pages.append(page, out);
        out.extend_from_slice(b"\r\n");
    }

    fn ask(&mut self, wanted: &[u64], out: &mut Vec<u8>) {
        begin(out, if wanted.len() == 1 { "GET" } else { "MGET" }, wanted.len());
        wanted.iter().for_each(|page| key(out, *page));
    }

    fn take(&mut self, bytes: &[u8], _: &VecDeque<u64>) -> anyhow::Result<Option<Part>> {
        let Some(line) = line(bytes) else {
            return Ok(None);
        };
        let head = line.len() + 2;
        match line {
            b"+OK" => Ok(Some(Part::of(head, true))),
            b"$4096" => {
                let whole = head + PAGE_BYTES + 2;
                if bytes.len() < whole {
                    return Ok(None);
                }
                self.left = self.left.saturating_sub(1);
                let page = Some(head..head + PAGE_BYTES);
                Ok(Some(Part { bytes: whole, page, ends: self.left == 0 }))
            }
            [b'*', count @ ..] => {
                self.left = str::from_utf8(count)?.parse().context("length of an array")?;
                Ok(Some(Part::of(head, false)))
            }
            other => bail!("Redis said {:?}", String::from_utf8_lossy(other)),
        }
    }
}

/// Begins a command with so many arguments.
fn begin(out: &mut Vec<u8>, name: &str, arguments: usize) {
    let _ = write!(out, "*{}\r\n${}\r\n{name}\r\n", arguments + 1, name.len());
}

fn key(out: &mut Vec<u8>, page: u64) {
    let digits = page.checked_ilog10().unwrap_or(0) + 1;
    let _ = write!(out, "${}\r\np{page}\r\n", digits + 1);
}
