//! Here-documents and lines that are continued: what the parser does not give as a shell would read it.
//!
//! Owns: which words begin a here-document, as BuildKit has it: those of RUN, COPY and ADD that are `<<NAME`, `<<-NAME` or `<<'NAME'`,
//! unless the instruction is in its JSON form. Never decides what an instruction with one becomes.

use std::{collections::BTreeMap, ops::Range};

use super::DockerfileError;

/// What was found.
pub(super) struct Found {
    /// The text without here-documents, byte for byte as long: every position in it is one in the user's text. `ENTRYPOINT []`, which
    /// the parser refuses, has quotes instead of brackets.
    pub for_parser: String,
    /// Those with here-documents, VOLUME, and CMD and ENTRYPOINT in their shell form; by the position of the keyword.
    pub instructions: BTreeMap<usize, Joined>,
}

/// An instruction as a shell would read it.
pub(super) struct Joined {
    /// What stands behind keyword and flags, on one line.
    pub command: String,
    pub documents: Vec<Document>,
    /// Where its last line ends, which may be the closing line of a document.
    pub end: usize,
}

/// One here-document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Document {
    pub name: String,
    /// `<<-`: tabs in front of lines are not part of it.
    pub strips_tabs: bool,
    /// Of its name; nothing in it is a variable then.
    pub quoted: bool,
    /// As written, without the closing line.
    pub text: String,
}

impl Document {
    /// What a program reads of it.
    pub fn content(&self) -> String {
        if !self.strips_tabs {
            return self.text.clone();
        }
        self.text.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// Looks through a Dockerfile.
pub(super) fn find(text: &str) -> Result<Found, DockerfileError> {
    let escape = escape(text);
    let mut for_parser = text.as_bytes().to_vec();
    let mut instructions = BTreeMap::new();
    let mut lines = Lines { text, at: 0, number: 0 };
    while let Some(first) = lines.next_instruction() {
        let number = lines.number;
        let start = first.end - text[first.clone()].trim_start().len();
        let (joined, end) = lines.join(start..first.end, escape);
        let (mut at, mut rest) = (start, joined.as_str());
        if let Some(inner) = after(rest, "ONBUILD") {
            (at, rest) = (at + rest.len() - inner.len(), inner);
        }
        if after(rest, "ENTRYPOINT").is_some_and(is_empty_array) {
            replace(&mut for_parser[start..end], |byte| matches!(byte, b'[' | b']').then_some(b'"'));
        }
        let is_json = |command| serde_json::from_str::<Vec<String>>(command).is_ok();
        let shell_form = ["CMD", "ENTRYPOINT"].iter().find_map(|keyword| after(rest, keyword)).filter(|command| !is_json(command));
        if let Some(command) = shell_form.or_else(|| after(rest, "VOLUME")) {
            instructions.insert(at, Joined { command: command.trim_end().to_owned(), documents: Vec::new(), end });
            continue;
        }
        let Some(arguments) = ["RUN", "COPY", "ADD"].iter().find_map(|keyword| after(rest, keyword)) else { continue };
        let command = without_flags(arguments);
        if is_json(command) {
            continue;
        }
        let mut documents: Vec<Document> = words(command).into_iter().filter_map(begins).collect();
        if documents.is_empty() {
            continue;
        }
        replace(&mut for_parser[start..end], |byte| (byte == b'<').then_some(b' '));
        for document in &mut documents {
            let body = lines.body(document).ok_or_else(|| DockerfileError::Line {
                line: number,
                why: format!("its here-document does not end: no line below it is {} and nothing else", document.name),
            })?;
            replace(&mut for_parser[body], |byte| (!matches!(byte, b'\r' | b'\n')).then_some(b'#'));
        }
        let end = lines.text[..lines.at].trim_end_matches(['\r', '\n']).len();
        instructions.insert(at, Joined { command: command.trim_end().to_owned(), documents, end });
    }
    let for_parser = String::from_utf8(for_parser).expect("only whole characters are replaced, by others of one byte each");
    Ok(Found { for_parser, instructions })
}

fn replace(bytes: &mut [u8], with: impl Fn(u8) -> Option<u8>) {
    for byte in bytes {
        *byte = with(*byte).unwrap_or(*byte);
    }
}

/// The lines of a text, one after the other.
struct Lines<'t> {
    text: &'t str,
    /// Where the next one begins.
    at: usize,
    /// Of the last one, counted from 1.
    number: usize,
}

impl Lines<'_> {
    /// The next line, without its end.
    fn next(&mut self) -> Option<Range<usize>> {
        let rest = self.text.get(self.at..).filter(|rest| !rest.is_empty())?;
        let start = self.at;
        let (line, length) = rest.split_once('\n').map_or((rest, rest.len()), |(line, _)| (line, line.len() + 1));
        (self.at, self.number) = (start + length, self.number + 1);
        Some(start..start + line.strip_suffix('\r').unwrap_or(line).len())
    }

    /// The next line that is neither empty nor a comment.
    fn next_instruction(&mut self) -> Option<Range<usize>> {
        loop {
            let line = self.next()?;
            let text = self.text[line.clone()].trim_start();
            if !text.is_empty() && !text.starts_with('#') {
                return Some(line);
            }
        }
    }

    /// A line with those that continue it as one, and where the last of them ends.
    fn join(&mut self, mut line: Range<usize>, escape: char) -> (String, usize) {
        let mut joined = String::new();
        loop {
            let text = &self.text[line.clone()];
            let Some(body) = text.trim_end_matches([' ', '\t']).strip_suffix(escape) else {
                joined.push_str(text);
                return (joined, line.end);
            };
            joined.push_str(body);
            let end = line.end;
            let Some(next) = self.next_instruction() else { return (joined, end) };
            line = next;
        }
    }

    /// Fills in a document that begins on the next line. Returns where it stands, its closing line included; `None` if it has none.
    fn body(&mut self, document: &mut Document) -> Option<Range<usize>> {
        let start = self.at;
        loop {
            let before = self.at;
            let line = self.next()?;
            let text = &self.text[line.clone()];
            let text = if document.strips_tabs { text.trim_start_matches('\t') } else { text };
            if text == document.name {
                self.text[start..before].clone_into(&mut document.text);
                return Some(start..line.end);
            }
        }
    }
}

/// What continues a line, by the directives at the top.
fn escape(text: &str) -> char {
    let directives = text.lines().map_while(|line| line.trim_start().strip_prefix('#')?.split_once('='));
    let escape = directives.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("escape"));
    if escape.is_some_and(|(_, value)| value.trim() == "`") { '`' } else { '\\' }
}

/// What follows a keyword that begins `text`.
fn after<'t>(text: &'t str, keyword: &str) -> Option<&'t str> {
    let (word, rest) = text.split_at_checked(keyword.len())?;
    (word.eq_ignore_ascii_case(keyword) && rest.starts_with([' ', '\t'])).then(|| rest.trim_start())
}

fn without_flags(mut arguments: &str) -> &str {
    while arguments.starts_with("--") {
        arguments = arguments.split_once([' ', '\t']).map_or("", |(_, rest)| rest.trim_start());
    }
    arguments
}

fn is_empty_array(text: &str) -> bool {
    text.trim_end().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).is_some_and(|inside| inside.trim().is_empty())
}

/// Splits at blanks outside of quotes, and leaves the quotes where they are.
pub(super) fn words(text: &str) -> Vec<&str> {
    let (mut words, mut start, mut quote, mut escaped) = (Vec::new(), None, None, false);
    for (at, c) in text.char_indices() {
        let splits = quote.is_none() && !escaped && c.is_whitespace();
        match c {
            _ if escaped => escaped = false,
            '\\' if quote != Some('\'') => escaped = true,
            '"' | '\'' if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            _ => {}
        }
        if splits {
            words.extend(start.take().map(|start| &text[start..at]));
        } else {
            start.get_or_insert(at);
        }
    }
    words.extend(start.map(|start| &text[start..]));
    words
}

/// The document that a word begins, without its text yet.
pub(super) fn begins(word: &str) -> Option<Document> {
    let behind = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (written, strips_tabs) = behind.strip_prefix('-').map_or((behind, false), |behind| (behind, true));
    let name = written.replace(['"', '\'', '\\'], "");
    if name.is_empty() || name.contains('<') {
        return None;
    }
    Some(Document { quoted: name != written, name, strips_tabs, text: String::new() })
}
