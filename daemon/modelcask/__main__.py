from modelcask.cli.main import main

main()
