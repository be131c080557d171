use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse(text.as_bytes()).unwrap()
}

fn images(text: &str) -> Vec<String> {
    parse(text).images.into_iter().map(|image| image.reference).collect()
}

fn error(text: &str) -> String {
    Dockerfile::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn images_are_found_wherever_they_are_named() {
    for (text, expected) in [
        ("FROM debian:12\n", vec!["debian:12"]),
        ("from debian\n", vec!["debian"]),
        ("# syntax=docker/dockerfile:1\n\nFROM --platform=linux/arm64 a/b:1 AS x\nFROM scratch\nCOPY --from=X . .\n", vec!["a/b:1"]),
        ("ARG TAG=12\nARG BASE=\"debian:${TAG}\"\nFROM $BASE\n", vec!["debian:12"]),
        ("ARG A=x B=y\nFROM ${A}/${B:-no}:${C:-1}${A:+2}$C\n", vec!["x/y:12"]),
        ("FROM a-$TARGETARCH\n", if cfg!(target_arch = "aarch64") { vec!["a-arm64"] } else { vec!["a-amd64"] }),
        ("FROM a as build\nFROM b\nCOPY --from=build /x /x\nCOPY --from=c:1 /z /z\n", vec!["a", "b", "c:1"]),
        ("FROM a\nFROM b\nCOPY --from=0 /y /y\nCOPY --from=1 /y /y\n", vec!["a", "b"]),
        ("ARG S=two\nFROM a AS one\nFROM b AS two\nFROM $S\n", vec!["b"]),
        ("FROM a AS one\nCOPY --from=unused /x /x\nFROM b AS two\nRUN --mount=from=c true\nFROM one\nFROM two\nCOPY --from=two /x /x\n", vec!["b", "c"]),
        ("FROM a\nONBUILD COPY --from=tools /x /x\n", vec!["a", "tools"]),
        ("FROM a\nRUN --mount=type=bind,from=tools,target=/t /t/run\n", vec!["a", "tools"]),
        ("FROM a\nFROM a\n", vec!["a"]),
        ("FROM \\\n  a\n", vec!["a"]),
        ("\u{feff}FROM a\r\nRUN x\r\n", vec!["a"]),
        ("FROM a\nRUN echo \\\n# a comment inside\n FROM b\n", vec!["a"]),
        ("FROM a\nRUN <<EOF\nFROM b\nEOF\n", vec!["a"]),
    ] {
        assert_eq!(images(text), expected, "{text}");
    }
}

#[test]
fn what_cannot_be_read_names_its_line() {
    assert!(error("FROM a\n\nFOO bar\n").starts_with("Dockerfile line 3: "), "{}", error("FROM a\n\nFOO bar\n"));
    assert!(error("RUN x\nFROM a\n").starts_with("Dockerfile line 1: "));
    assert!(error("ARG X\nFROM $X\n").contains("line 2: FROM $X names no image"));
    assert!(error("FROM a\n\nRUN cat <<EOF\nhello there\n EOF\n").starts_with("Dockerfile line 3: its here-document does not end: no line below it is EOF"));
    assert!(error("FROM a\nCOPY x <<EOF /x/\nhi\nEOF\n").contains("line 2: files and here-documents in one COPY"));
    assert!(error("FROM a\nCOPY <<EOF /x\n$hi\nEOF\n").contains("line 2: the here-document EOF of a COPY or ADD has a `$`"));
    assert!(error("FROM a\nCOPY <<../x /x\nhi\n../x\n").contains("cannot be called \"../x\""));
    assert!(error("").contains("cannot be read"), "{}", error(""));
    assert!(matches!(Dockerfile::parse(b"FROM \xff"), Err(DockerfileError::NotText)));
    assert!(matches!(Dockerfile::parse(b"FROM a\0b"), Err(DockerfileError::NotText)));
    assert!(matches!(Dockerfile::parse(&vec![b'#'; MAX_BYTES + 1]), Err(DockerfileError::TooLarge)));
}

#[test]
fn a_step_of_the_build_is_found_on_its_line() {
    let file = parse("ARG X=1\nFROM a as b\n\nRUN one && \\\n  two\nFROM c\n# comment\nEXPOSE 80\nCMD x\n");
    let line = |stage, step, total| file.step(stage, step, total).map(|step| (step.line, step.text.as_str()));
    assert_eq!(line(Some(1), 1, 2), Some((2, "FROM a as b")));
    assert_eq!(line(Some(1), 2, 2), Some((4, "RUN one && …")));
    assert_eq!(line(Some(2), 3, 3), Some((9, "CMD x")));
    assert_eq!(line(None, 2, 3), Some((8, "EXPOSE 80")), "without a stage it is the last one");
    // Two triggers of the base image come first.
    assert_eq!(line(Some(2), 4, 5), Some((8, "EXPOSE 80")));
    assert_eq!(line(Some(2), 5, 5), Some((9, "CMD x")));
    assert_eq!(line(Some(3), 1, 1), None);
    assert_eq!(line(Some(0), 1, 1), None);
}

#[test]
fn a_platform_is_left_out_and_said_so() {
    let file = parse("FROM --platform=linux/arm64 a AS b\nRUN x\n");
    assert_eq!(file.text, format!("FROM {} a AS b\nRUN x\n", " ".repeat(22)));
    assert!(file.notes[0].contains("line 1: --platform=linux/arm64 is left out"), "{:?}", file.notes);
}

#[test]
fn a_variable_in_from_is_filled_in() {
    let file = parse("ARG S=x V=\"12\"\nFROM a:${V} AS x\nFROM $S\n");
    assert_eq!(file.text, "ARG S=x V=\"12\"\nFROM a:12 AS x\nFROM x\n");
}

#[test]
fn flags_that_change_nothing_are_left_out() {
    let file = parse("FROM a\nCOPY --link --chown=1 a /b\nADD --link=true a /b\nHEALTHCHECK --start-interval=1s CMD x\n");
    let blank = |count| " ".repeat(count);
    assert_eq!(file.text, format!("FROM a\nCOPY {} --chown=1 a /b\nADD {} a /b\nHEALTHCHECK {} CMD x\n", blank(6), blank(11), blank(19)));
    assert!(file.notes[1].starts_with("Dockerfile line 3: --link=true is left out; "), "{:?}", file.notes);
    assert_eq!(file.notes.len(), 3);
}

#[test]
fn the_shell_form_is_of_the_shell_that_was_set() {
    let file = parse("FROM a AS b\nSHELL [\"bash\", \"-c\"]\nFROM b\nENTRYPOINT x \\\n  \"$Y\"\nCMD [\"z\"]\nFROM b\nCMD z\n");
    let expected = "ENTRYPOINT [\"bash\",\"-c\",\"x   \\\"$Y\\\"\"]\n\nCMD [\"z\"]\nFROM b\nCMD [\"bash\",\"-c\",\"z\"]\n";
    assert!(file.text.ends_with(expected), "{}", file.text);
    let text = "FROM a\nCMD x\nSHELL [\"bash\", \"-c\"]\nFROM a\nCMD x\n";
    assert_eq!(parse(text).text, text);
}

#[test]
fn a_volume_is_declared_when_all_is_done() {
    let file = parse("FROM a AS b\nVOLUME /x \\\n /y\nVOLUME $X\nRUN one\n# next\nFROM b\nvolume [\"/z\"]\nVOLUME $Z\nRUN two");
    assert_eq!(file.text, "FROM a AS b\n\n\nVOLUME $X\nRUN one\n# next\nFROM b\n\n\nRUN two\nVOLUME /x  /y\nVOLUME [\"/z\"]\nVOLUME $Z");
    let step = |stage, step, total| file.step(Some(stage), step, total).map(|step| step.line);
    assert_eq!([1, 2, 3].map(|at| step(1, at, 3)), [Some(1), Some(4), Some(5)]);
    assert_eq!([1, 2, 3, 4, 5].map(|at| step(2, at, 5)), [Some(7), Some(10), Some(2), Some(8), Some(9)]);
    assert_eq!(file.step_on(9).unwrap().text, "VOLUME $Z");
}

#[test]
fn an_entrypoint_can_be_taken_back() {
    for text in ["FROM a\nENTRYPOINT []\nCMD x\n", "FROM a\nentrypoint \\\n [ ]\nCMD [\"x\"]\n"] {
        assert_eq!(parse(text).text, text);
    }
}

/// The script of the only RUN, or what else stands on its line.
#[track_caller]
fn check_run(dockerfile: &str, expected: &[&str]) {
    let file = parse(dockerfile);
    let line = file.text.lines().find(|line| line.starts_with("RUN")).unwrap();
    let words: Vec<String> = serde_json::from_str(line.trim_start_matches("RUN --network=none").trim_start_matches("RUN")).unwrap();
    assert_eq!(words, expected);
    let newlines = |text: &str| text.matches('\n').count();
    assert_eq!(newlines(&file.text), newlines(dockerfile), "every line stays on its number: {}", file.text);
}

#[test]
fn here_documents_become_commands() {
    check_run("FROM a\nRUN <<EOF\necho \"$HOME\"\necho two\\\n three\n\n# no comment\nEOF\nCMD x\n", &[
        "/bin/sh", "-c", "echo \"$HOME\"\necho two\\\n three\n\n# no comment\n",
    ]);
    check_run("FROM a\nSHELL [\"bash\", \"-eu\", \"-c\"]\nRUN --network=none <<'E'\nx\nE", &["bash", "-eu", "-c", "x\n"]);
    check_run("FROM a AS b\nSHELL [\"bash\", \"-c\"]\nFROM b\nRUN <<-E\n\t\tx\n\tE\n", &["bash", "-c", "x\n"]);
    check_run("FROM a\nRUN <<EOF\n#!/usr/bin/python3\nprint(1)\nEOF\n", &["/bin/sh", "-c", RUN_AS_FILE, "#!/usr/bin/python3\nprint(1)\n"]);
    let file = parse("FROM a\nRUN <<E\nx\nE\nCMD x\n");
    assert_eq!(file.step(None, 3, 3).unwrap().line, 5);
}

#[test]
fn a_shell_reads_the_here_documents_of_its_line() {
    check_run("FROM a\nRUN cat <<EOF >/x\nRUN y\nEOF\n", &["/bin/sh", "-c", "cat <<EOF >/x\nRUN y\nEOF\n"]);
    check_run("FROM a\nRUN a && \\\n  # comment\n  cat <<-'A' 3<<\"B\" > /b\n1\n\tA\n2\nB\n", &[
        "/bin/sh", "-c", "a &&   cat <<-'A' 3<<\"B\" > /b\n1\nA\n2\nB\n",
    ]);
    check_run("FROM a\r\nRUN python3 <<EOF\r\nprint(1)\r\nEOF\r\n", &["/bin/sh", "-c", "python3 <<EOF\nprint(1)\r\nEOF\n"]);
    let file = parse("# escape=`\nFROM a\nONBUILD RUN x `\n <<EOF\ny\nEOF\n");
    assert_eq!(file.text, "# escape=`\nFROM a\nONBUILD RUN [\"/bin/sh\",\"-c\",\"x  <<EOF\\ny\\nEOF\\n\"]\n\n\n\n");
    for untouched in ["RUN cat <<<word", "RUN [\"cat\", \"<<EOF\"]", "RUN echo '<<EOF' \"x <<EOF\"", "RUN a << b", "RUN echo $((1<<2))", "# RUN <<EOF", "CMD cat <<EOF"] {
        let text = format!("FROM a\n{untouched}\n");
        assert_eq!(parse(&text).text, text);
    }
}

#[test]
fn here_documents_become_files() {
    let file = parse("FROM a\nCOPY --chmod=600 <<a.txt <<-'B' /to/\nhi\na.txt\n\t$HOME\n\tB\nADD --link <<C \"/with blank\"\nC\nCMD x");
    let expected = "FROM a\nCOPY --chmod=600 --from=dormouse-here-documents 2/a.txt 2/B /to/\n\n\n\n\nCOPY        --from=dormouse-here-documents 7/C \"/with blank\"\n\nCMD x";
    assert_eq!(file.text, expected);
    let files: Vec<(&str, &str)> = file.files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    assert_eq!(files, [("2/a.txt", "hi\n"), ("2/B", "$HOME\n"), ("7/C", "")]);
    assert_eq!(file.images.len(), 1);
}

#[test]
fn exposed_ports_of_the_last_stage_keep_their_order() {
    assert_eq!(parse("FROM a AS b\nEXPOSE 7\nFROM b\nEXPOSE 6\n").exposed, [7, 6]);
    assert_eq!(parse("FROM a\nEXPOSE 1\nFROM b\nEXPOSE 9000 80/tcp\nEXPOSE 53/udp $PORT 443\n").exposed, [9000, 80, 53, 443]);
}

proptest! {
    /// Whatever is written, reading it ends in an answer, and every line stays on its number.
    #[test]
    fn any_text_is_read_or_refused(lines in prop::collection::vec(prop_oneof![
        Just("FROM a AS b".to_owned()), Just("RUN <<EOF".to_owned()), Just("EOF".to_owned()), Just("ONBUILD COPY <<A <<-'EOF' ü".to_owned()),
        Just("RUN x \\".to_owned()), Just("# escape=`".to_owned()), Just("ENTRYPOINT [ ]".to_owned()), Just("COPY --from=b x y".to_owned()),
        Just("ARG A=$A".to_owned()), Just("FROM ${A:-x".to_owned()), Just("SHELL [\"x\"]".to_owned()), "[ -~]{0,30}", "\\PC{0,10}",
    ], 0..12)) {
        let text = lines.join("\n");
        if let Ok(file) = Dockerfile::parse(text.as_bytes()) {
            prop_assert_eq!(file.text.matches('\n').count(), text.matches('\n').count(), "{}", file.text);
        }
    }
}
