from mohawk_nas.cli import main

if __name__ == "__main__":
    main()
