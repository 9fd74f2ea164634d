//! Input for real programs, the same for the same arguments: lines to sort, a C file to compile.

use std::io::{self, BufWriter, Write};

use clap::{Parser, Subcommand};
use farmem_workloads::Content;

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Lines of 64 characters in no order that no compressor finds one in.
    Lines {
        #[arg(long, default_value_t = 1536)]
        mebibytes: u64,
    },
    /// A C file with so many functions that call each other.
    C {
        #[arg(long, default_value_t = 4000)]
        functions: u64,
    },
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let content = Content::new(arguments.seed);
    let mut output = BufWriter::with_capacity(1 << 20, io::stdout().lock());
    match arguments.what {
        What::Lines { mebibytes } => lines(content, mebibytes << 20, &mut output)?,
        What::C { functions } => c_file(content, functions, &mut output)?,
    }
    output.flush()
}

fn lines(content: Content, bytes: u64, output: &mut impl Write) -> io::Result<()> {
    const ALPHABET: &[u8; 64] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~";
    const LINE_BYTES: u64 = 64;
    const CHARACTERS_PER_WORD: u64 = 9;
    let mut line = [b'\n'; LINE_BYTES as usize];
    for number in 0..bytes / LINE_BYTES {
        let words = (0..).map(|word| content.word(number * 7 + word));
        let characters = words.flat_map(|word| {
            (0..CHARACTERS_PER_WORD).map(move |place| ALPHABET[(word >> (6 * place) & 63) as usize])
        });
        // All but the last place, which keeps its newline.
        line.iter_mut().take(63).zip(characters).for_each(|(place, found)| *place = found);
        output.write_all(&line)?;
    }
    Ok(())
}

fn c_file(content: Content, functions: u64, output: &mut impl Write) -> io::Result<()> {
    for number in 0..functions {
        let [factor, shift, count, callee] =
            [0, 1, 2, 3].map(|word| content.word(number * 4 + word));
        let (factor, shift, count) = (factor & 0xffff | 1, shift % 31 + 1, count % 61 + 3);
        writeln!(output, "unsigned f{number}(unsigned *a, unsigned n) {{")?;
        writeln!(output, "  unsigned s = n;")?;
        writeln!(output, "  for (unsigned i = 0; i < {count}u; i++) {{")?;
        writeln!(output, "    a[i] = a[i] * {factor}u + (s >> {shift});")?;
        writeln!(output, "    if (a[i] & 1u) s ^= a[i] << {shift}; else s += a[i] / 3u;")?;
        writeln!(output, "  }}")?;
        if number > 0 {
            writeln!(output, "  if (s & 8u) s += f{}(a, s);", callee % number)?;
        }
        writeln!(output, "  return s;\n}}")?;
    }
    Ok(())
}
